"""What the played libraries counted and logged in this process, and where its threads stopped."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gpu.fake.machine import library

LAUNCHES = ("kernel", "product", "memset", "on_gpu")
COPIES = ("to_gpu", "to_gpu_pageable", "from_gpu", "from_gpu_pageable", "peer")
SYNCS = ("stream_sync", "device_sync", "event_sync")
_ROOT = Path(__file__).resolve().parents[3]
_OUTSIDE = Path(__file__).parent
_ROOM = 1 << 14

_lib = ctypes.CDLL(str(library(Path(os.environ["HMC_FAKE_FOLDER"]), "cudart")))
_lib.fake_log.restype = ctypes.c_char_p
_lib.fake_copy_at_most.argtypes = [ctypes.c_size_t]
_Told = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@dataclass(frozen=True)
class Stop:
    """A call in which a thread waits for a GPU, or may: what it was, during which step ("" outside
    of all), and hmc's line that made it."""

    thread: int
    what: str
    step: str
    where: str


@dataclass(frozen=True)
class Counts:
    """Calls since `reset`: of kernels and products one by one, graphs replayed, copies between host
    and GPUs, waits for GPUs of all threads."""

    launches: int
    graphs: int
    copies: int
    syncs: int

    def __str__(self) -> str:
        """As the table has it."""
        return f"{self.launches:,} / {self.graphs:,} / {self.copies:,} / {self.syncs:,}"


stops: list[Stop] = []
"""Of all threads, since `reset`."""
_doing = threading.local()


def begin_step(label: str) -> None:
    """The thread is at a step from here on ("": at none), also in the log."""
    _doing.step = label
    note(f"step {label}")


def keep() -> None:
    """Keep lines and stops from here on."""
    _lib.fake_keep(1)
    _lib.fake_tell_stops(_tell)


def reset() -> None:
    """Forget counts, lines and stops."""
    _lib.fake_reset()
    stops.clear()


def note(line: str) -> None:
    """Write a line into the log."""
    _lib.fake_note(line.encode())


def lines(thread: int = 0) -> list[str]:
    """The log since `reset`: of one thread (its native id), or all with their ids before them."""
    found: bytes = _lib.fake_log()
    every = found.decode(errors="replace").splitlines()
    if not thread:
        return every
    start = f"{thread} "
    return [line.removeprefix(start) for line in every if line.startswith(start)]


def illegal(first: int = 0) -> list[str]:
    """What a GPU would have refused, each once; from so many lines of the log on."""
    found = (line.partition(" ILLEGAL ")[2] for line in lines()[first:] if " ILLEGAL " in line)
    return list(dict.fromkeys(found))


def counts() -> Counts:
    """Since `reset`."""
    text = ctypes.create_string_buffer(_ROOM)
    _lib.fake_counts(text, ctypes.c_size_t(_ROOM))
    calls = {name: int(n) for name, n, _ in map(str.split, text.value.decode().splitlines())}
    launches, copies, syncs = (sum(map(calls.__getitem__, of)) for of in (LAUNCHES, COPIES, SYNCS))
    return Counts(launches, calls["graph"], copies, syncs)


def copy_at_most(nbytes: int) -> None:
    """Copies of more bytes are counted and not done; 0: all are done."""
    _lib.fake_copy_at_most(nbytes)


def stopped(what: str) -> None:
    """Note that this thread waits."""
    step: str = getattr(_doing, "step", "")
    stops.append(Stop(threading.get_native_id(), what, step, _where()))


def _where() -> str:
    """The innermost line of hmc's own that is under way in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT) and not path.is_relative_to(_OUTSIDE):
            inside = path.relative_to(_ROOT)
            if not re.match(r"\.|build", str(inside)):  # environments lie in the checkout
                name = str(inside).removeprefix("hmc/") if _linked(inside) else str(inside)
                return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _linked(path: Path) -> bool:
    return len(path.parts) > 1 and (_ROOT / "hmc" / path.parts[1]).is_symlink()


def _on_stop(what: bytes) -> None:
    stopped(what.decode())


_tell: Callable[[bytes], None] = _Told(_on_stop)
