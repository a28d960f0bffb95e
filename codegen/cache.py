"""The compiled kernels on disk; hides the file format, what a key depends on, and folders that
cannot be read or written.

A file holds the SHA-256 of an object, in hex, a line end and the object. Its name is the kernel's
symbol and a digest of LLVM's version, the tier, the weight format's row and the source of this
package, so an edit of an emitter never meets a stale object; a file that does not match its digest
counts as absent. Files are replaced whole, so processes share the folder. A folder that cannot be
used costs compile time and nothing else: that is said once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import llvmlite
from llvmlite import binding

from hmc import env
from hmc.codegen.isa import Isa
from hmc.codegen.spec import KernelSpec
from hmc.files import write_beside
from hmc.formats import Format, format_of

_STALE_S = 3600
"""What is not an object and older than this was left by a process that died while it wrote."""


def path_of(spec: KernelSpec) -> Path:
    """Where the compiled object of `spec` is, or would be."""
    row = format_of(spec.weight) if spec.weight else None
    return env.cache_dir() / "kernels" / f"{spec.symbol}-{_key(spec.tier, row)}.o"


def load(spec: KernelSpec) -> bytes | None:
    """The object of `spec`; None where there is none, or a damaged one."""
    path = path_of(spec)
    try:
        digest, _, code = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        _say_once(path.parent, error.strerror)
        return None
    return code if digest == _digest(code) else None


def store(spec: KernelSpec, code: bytes) -> None:
    """Keep the object of `spec`, where the folder takes it."""
    path = path_of(spec)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        write_beside(path, _digest(code) + b"\n" + code)
    except OSError as error:
        _say_once(path.parent, error.strerror)


def is_writable() -> bool:
    """Whether `store` keeps anything now; says so where not."""
    folder = env.cache_dir() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        _say_once(folder, error.strerror)
        return False
    return True


def _digest(code: bytes) -> bytes:
    return hashlib.sha256(code).hexdigest().encode()


@cache
def _say_once(folder: Path, reason: str | None) -> None:
    """Once a process for every folder and reason."""
    print(
        f"hmc: kernel cache {folder} cannot be used: {reason}; kernels are compiled without it"
        " (HMC_CACHE names another folder)",
        file=sys.stderr,
    )


@cache
def _sweep(folder: Path) -> None:
    """Remove stale temporaries, once a process."""
    before = time.time() - _STALE_S
    for entry in os.scandir(folder):
        # Another process may be sweeping too.
        with contextlib.suppress(FileNotFoundError):
            if not entry.name.endswith(".o") and entry.stat().st_mtime < before:
                os.unlink(entry)


@cache
def _key(isa: Isa, row: Format | None) -> str:
    """12 hex digits over LLVM's version, the tier's target, the format's row and this package's
    source.
    """
    digest = hashlib.sha256()
    digest.update(
        repr((llvmlite.__version__, binding.llvm_version_info, isa.tune, isa.features)).encode()
    )
    if row is not None:
        digest.update(repr((row.planes, row.exact_in, row.values)).encode())
    for source in sorted(Path(__file__).resolve().parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
