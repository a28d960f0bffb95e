"""Environment variables, folders and the process's garbage collector, in one place; hides XDG
rules and parsing.

HMC_DEBUG      0-6: 1 decisions and times, 2 op diff per pass, 3 graph after each pass, 4 plan,
               5 LLVM IR, 6 assembly (each level includes those below); goes to stderr
HMC_DUMP       folder that receives 00-trace.txt, 01-<pass>.txt, plan.json, kernels/*.ll, *.s
HMC_CACHE      folder of compiled kernels and kept plans (default $XDG_CACHE_HOME/hmc)
HMC_CONFIG     folder of machine profiles   (default $XDG_CONFIG_HOME/hmc)
HMC_STATE      folder of what hmc remembers: a chat's history (default $XDG_STATE_HOME/hmc)
HMC_ISA        cap on the kernel tier: avx512_bf16, avx512 or avx2 (default: the best there is)
HMC_THREADS    native worker threads (default: every CPU whose time the process may use)
HMC_GRAPHS     1: decode hands GPUs its steps as graphs, 0: one by one (default: 1 for CUDA, 0 for
               GPUs that are played)
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hmc import cgroup
from hmc.errors import UsageError

MOST_THREADS = 4096
"""Native workers that hmc starts at most."""

_collecting = threading.Lock()
_uncollected = 0  # how many `uncollected` blocks are under way, in all threads
_was_collecting = True


def debug_level() -> int:
    """`HMC_DEBUG` as 0..6; `UsageError` when it is no number in that range."""
    return _integer("HMC_DEBUG", default=0, low=0, high=6)


def debug(level: int, text: str) -> None:
    """Print `text` to stderr when `HMC_DEBUG` is at least `level`."""
    if debug_level() >= level:
        print(text, file=sys.stderr)


def dump_dir() -> Path | None:
    """`HMC_DUMP` as a folder (made if absent), or None when unset."""
    value = os.environ.get("HMC_DUMP")
    if not value:
        return None
    folder = Path(value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"HMC_DUMP={value}: cannot create the folder: {error.strerror}") from error
    return folder


def dump(name: str, text: str) -> None:
    """Write `text` to `HMC_DUMP/name`, making folders; nothing when `HMC_DUMP` is unset."""
    folder = dump_dir()
    if folder is None:
        return
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def cache_dir() -> Path:
    """Folder for compiled kernels and kept plans; not created here."""
    return _folder("HMC_CACHE", "XDG_CACHE_HOME", ".cache")


def config_dir() -> Path:
    """Folder for machine profiles; not created here."""
    return _folder("HMC_CONFIG", "XDG_CONFIG_HOME", ".config")


def state_dir() -> Path:
    """Folder for what is remembered between runs; not created here."""
    return _folder("HMC_STATE", "XDG_STATE_HOME", ".local/state")


def isa_cap() -> str | None:
    """`HMC_ISA`, unchecked, or None; the codegen package knows the valid names."""
    return os.environ.get("HMC_ISA") or None


def threads() -> int:
    """Native worker threads: `HMC_THREADS`, else `usable_cpus`."""
    return _integer("HMC_THREADS", default=usable_cpus(), low=1, high=MOST_THREADS)


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs whose time the process may use: those of its affinity mask, or fewer under a quota of
    its control groups (rounded down, at least one).

    With a worker more than the quota, all are stopped in every period, and every step waits.
    """
    there = len(os.sched_getaffinity(0))
    quota = cgroup.cpus(root)
    return there if quota is None else min(there, max(1, int(quota)))


def graphs(default: bool) -> bool:
    """`HMC_GRAPHS`: whether decode hands GPUs graphs."""
    return bool(_integer("HMC_GRAPHS", default=int(default), low=0, high=1))


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile, for work that makes many objects and keeps them: loading a
    plan, emitting IR and passes spend up to a half of their time in collections that find nothing.

    The collector is the process's: it stays off until the last of all blocks, in whatever threads
    they are, is over, and is then as it was before the first.
    """
    global _uncollected, _was_collecting
    with _collecting:
        if _uncollected == 0:
            _was_collecting = gc.isenabled()
            gc.disable()
        _uncollected += 1
    try:
        yield
    finally:
        with _collecting:
            _uncollected -= 1
            if _uncollected == 0 and _was_collecting:
                gc.enable()


def _folder(own: str, xdg: str, fallback: str) -> Path:
    if value := os.environ.get(own):
        return Path(value)
    base = os.environ.get(xdg)
    return (Path(base) if base else Path.home() / fallback) / "hmc"


def _integer(name: str, default: int, low: int, high: int) -> int:
    text = os.environ.get(name)
    if text is None or text == "":
        return default
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"{name}={text}: not a whole number") from None
    if not low <= value <= high:
        raise UsageError(f"{name}={text}: must lie in {low}..{high}")
    return value
