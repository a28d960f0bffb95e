"""Compiles many kernels into the disk cache, in several processes, each told its specs on stdin.

llvmlite serialises every call of LLVM in one process, so a first start would otherwise use one
core.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import BinaryIO

from hmc import env
from hmc.codegen import cache
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError
from hmc.formats.table import is_built_in

_FEW = 4
"""Fewer missing kernels than this are left to the caller: starting a process costs as much."""

_COMMAND = [sys.executable, "-m", "hmc.codegen.build"]
_PATIENCE_S = 60.0
"""Seconds that a child may take for its start, and again for each kernel: they take one or two."""

Progress = Callable[[str, int, int], None]


def build(specs: Iterable[KernelSpec], progress: Progress | None = None) -> None:
    """Fill the cache with those of `specs` that it lacks, one process a core; left to the caller
    where the cache cannot be written, and for formats that only this process knows.

    `progress(what, done, total)` counts kernels. Raises `KernelError` with the last line of what
    went wrong. No child is left behind.
    """
    missing = [
        spec
        for spec in dict.fromkeys(specs)
        if is_built_in(spec.weight) and cache.load(spec) is None
    ]
    if len(missing) < _FEW or env.debug_level() >= 5 or env.dump_dir() is not None:
        return
    if not cache.is_writable():
        return
    workers = min(env.threads(), len(missing))
    end = time.monotonic() + _PATIENCE_S * (1 + -(-len(missing) // workers))
    with ExitStack() as stack:
        children = [_start(stack, missing[number::workers]) for number in range(workers)]
        for child, said in children:
            while child.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.25)
                _report(missing, progress)
                if time.monotonic() > end:
                    raise KernelError(
                        f"building {len(missing)} kernels takes too long: stopped; HMC_THREADS=1"
                        " builds one at a time"
                    )
            if child.returncode:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                last = lines[-1] if lines else f"its process ended with status {child.returncode}"
                raise KernelError(f"building kernels failed: {last}")
    _report(missing, progress)


def _start(stack: ExitStack, specs: list[KernelSpec]) -> tuple[subprocess.Popen[bytes], BinaryIO]:
    """A child that builds `specs`, and what it will say on stderr. Both ways are files in memory:
    nobody waits for a reader. `stack` ends and reaps it.
    """
    told, said = (os.fdopen(os.memfd_create(name), "w+b") for name in ("specs", "stderr"))
    stack.callback(told.close)
    stack.callback(said.close)
    pickle.dump(specs, told)
    told.seek(0)
    try:
        child = subprocess.Popen(_COMMAND, stdin=told, stdout=subprocess.DEVNULL, stderr=said)
    except OSError as error:
        raise KernelError(f"building kernels: no process starts: {error.strerror}") from error
    stack.callback(child.wait)
    stack.callback(child.kill)
    return child, said


def _report(specs: list[KernelSpec], progress: Progress | None) -> None:
    if progress is not None:
        done = sum(cache.path_of(spec).is_file() for spec in specs)
        progress("compiling kernels", done, len(specs))


if __name__ == "__main__":
    _jit = Jit(EMITTERS)
    for _spec in pickle.load(sys.stdin.buffer):
        _jit.object_code(_spec)
