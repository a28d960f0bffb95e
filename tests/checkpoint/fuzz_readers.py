"""A fuzzer of everything that reads a checkpoint: whatever a file holds, it is read or refused in
one line of an `HmcError`, soon, and with no more memory than files of its size may take.

    cd tests/checkpoint && python -m fuzz_readers --minutes 30

Guided by coverage: changed files that reach a pair of lines of hmc/checkpoint, hmc/formats or
hmc/models that none before reached are changed further. Files with which a reader fails are left
in --keep, and it ends with 1.
"""

from __future__ import annotations

import argparse
import math
import random
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz_mutations import changed
from fuzz_seeds import READERS, Reader

import hmc
from hmc.errors import HmcError

SECONDS = 10.0
"""Longest that a reader may take for a file, of the processor."""
_BYTES_A_BYTE = 64
_LONGEST = 1 << 16
_HOME = str(Path(hmc.__file__).parent)
_WATCHED = tuple(f"{_HOME}/{each}/" for each in ("checkpoint", "formats", "models"))


class TooSlow(BaseException):
    """A reader took longer than `SECONDS`; nothing catches it."""


class Coverage:
    """Pairs of lines that ran one after the other."""

    def __init__(self) -> None:
        self.pairs: set[tuple[str, int, int]] = set()

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """For `sys.settrace`."""
        file = frame.f_code.co_filename
        if not file.startswith(_WATCHED):
            return None
        previous = frame.f_lineno

        def lines(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal previous
            self.pairs.add((file, previous, frame.f_lineno))
            previous = frame.f_lineno
            return lines

        return lines


def failure(reader: Reader, directory: Path, data: bytes, seconds: float = SECONDS) -> str:
    """What is wrong in how `reader` takes a file of `data`, "" for nothing: in a line that failures
    of one cause have in common, then in others.
    """
    (directory / reader.name).write_bytes(data)
    most = (reader.megabytes << 20) + _BYTES_A_BYTE * len(data)

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    tracemalloc.start()
    try:
        reader.read(directory)
    except HmcError as error:
        said = str(error)
        if "\n" in said or not said.isprintable() or len(said) > 1500:
            return f"a message of {type(error).__name__} that is no line {_where(error)}\n{said!r}"
    except (Exception, TooSlow) as error:
        text = "".join(traceback.format_exception(error)[-8:])
        return f"{type(error).__name__} {_where(error)}\n{text}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.signal(signal.SIGPROF, before)
    return f"{peak} bytes for a file of {len(data)}" if peak > most else ""


def _where(error: BaseException) -> str:
    ours = [each for each in traceback.extract_tb(error.__traceback__) if _HOME in each.filename]
    return f"at {ours[-1].filename.removeprefix(_HOME)}:{ours[-1].lineno}" if ours else ""


def fuzz(
    name: str, seed: int, seconds: float = math.inf, files: float = math.inf,
    keep: Path | None = None,
) -> tuple[int, list[str]]:  # fmt: skip
    """Change files for so long, or so many; how many were tried, what failed, one of a cause."""
    reader, rng = READERS[name], random.Random(seed)
    coverage, corpus = Coverage(), list(reader.seeds())
    failures: dict[str, str] = {}
    tried, end = 0, time.monotonic() + seconds
    waiting = list(corpus)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        reader.prepare(directory)
        while time.monotonic() < end and tried < files:
            # Of those that reached something new, the latest more often.
            parent = corpus[-1 - int(rng.random() ** 2 * len(corpus))]
            data = waiting.pop() if waiting else changed(rng, parent, corpus, reader.name)
            if len(data) > _LONGEST:
                continue
            known = len(coverage.pairs)
            sys.settrace(coverage.trace)
            try:
                said = failure(reader, directory, data)
            finally:
                sys.settrace(None)
            tried += 1
            if len(coverage.pairs) > known:
                corpus.append(data)
            if said and (cause := said.split("\n")[0]) not in failures:
                failures[cause] = f"{name}: {said}\n{data[:300]!r}"
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{name}-{len(failures)}").write_bytes(data)
                    print(failures[cause], flush=True)
    return tried, list(failures.values())


def main() -> int:
    """By the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="for all readers together")
    parser.add_argument("--reader", choices=list(READERS), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="for what failed")
    asked = parser.parse_args()
    names = asked.reader or list(READERS)
    wrong = 0
    for name in names:
        tried, failures = fuzz(name, asked.seed, asked.minutes * 60 / len(names), keep=asked.keep)
        print(f"{name}: {tried} files, {len(failures)} causes of failure", flush=True)
        wrong += len(failures)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
