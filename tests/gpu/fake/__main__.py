"""`make gpu-fake`: builds the libraries, does the checks on played machines, and prints a table.

Exit code 1 where a statement does not hold, 5 where nothing can be built.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu.fake.build import build, include
from gpu.fake.machine import Played
from hmc.errors import HmcError

_ROOT = Path(__file__).resolve().parents[3]
_MACHINES = (Played(86, 16), Played(89, 24), Played(90, 140), Played(120, 32))
"""An RTX A4000, an RTX 4090, an H200 and an RTX 5090."""
_SECONDS = {"gpu-check": 2400.0}
_DEFAULT_SECONDS = 600.0
_COLUMNS = ("GPU", "statement", "verdict", "launches / graphs / copies / waits")
_SHOWN = 12


@dataclass(frozen=True)
class Run:
    """A check on a machine, in a process of its own that ends within `seconds`."""

    check: str
    machine: Played

    @property
    def seconds(self) -> float:
        """Whoever takes longer hangs, or the machine under it is too busy."""
        return _SECONDS.get(self.check, _DEFAULT_SECONDS)


def runs() -> Iterator[Run]:
    """All of them, in the table's order."""
    for machine in _MACHINES:
        for check in ("products", "small model", "order", "gpu-check"):
            yield Run(check, machine)
    for machine in (Played(89, 24), Played(120, 32)):
        yield Run("memory", machine)
    for check in ("small model", "sanitizer"):
        yield Run(check, Played(120, 32, sanitized=True))
    yield Run("default streams", Played(120, 32, gpus=2))
    yield Run("beside", Played(120, 32, gpus=2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs and print the table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpu.fake", description=__doc__)
    parser.add_argument("--only", metavar="WORD", help="runs with this in the check's name")
    parser.add_argument("--sm", type=int, help="runs on this compute capability")
    parser.add_argument("--folder", type=Path, default=_ROOT / "build" / "gpu-fake")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    try:
        built = build(given.folder.resolve())
    except HmcError as error:
        print(f"gpu-fake: error: {error}", file=sys.stderr)
        return error.exit_code
    folder = built[0].path.parent
    for each in built:
        written = f"{each.written} functions written, {each.generated} made"
        print(f"[{each.path.name}: {written}]", file=sys.stderr)
    rows: list[tuple[str, dict[str, Any]]] = []
    for run in runs():
        if (given.only or "") in run.check and given.sm in (None, run.machine.sm):
            rows += [(str(run.machine), found) for found in _done(run, folder)]
    print(f"hmc on played GPUs, PyTorch {torch.__version__}, {time.monotonic() - began:.0f} s\n")
    print(_table(rows))
    return 0 if rows and all(found["holds"] for _, found in rows) else 1


def _done(run: Run, folder: Path) -> list[dict[str, Any]]:
    """What a run says. Its output is kept in the folder; its end, however it comes, is told."""
    name = f"{run.check} on {run.machine}"
    stem = "".join(letter if letter.isalnum() else "-" for letter in name)
    target, output = folder / f"{stem}.json", folder / f"{stem}.txt"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu.fake.child", run.check, str(target)]
    environment = run.machine.environment(folder, include("cuda.h").parent / "lib")
    began = time.monotonic()
    with output.open("w") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            code: int | None = child.wait(run.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    took = time.monotonic() - began
    found: list[dict[str, Any]] = json.loads(target.read_text()) if target.exists() else []
    if code != 0:
        end = f"within {run.seconds:g} s" if code is None else f"with {code}"
        text = f"{run.check}: it ends" + (f" {end}" if code is None else "")
        last = output.read_text().strip().splitlines()[-1:]
        found.append({"text": text, "holds": False, "counts": "", "why": [end, *last]})
    held = sum(each["holds"] for each in found)
    print(f"[{name}: {held} of {len(found)} hold, {took:.0f} s]", file=sys.stderr, flush=True)
    return found


def _table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Aligned lines under their headings; below a statement that does not hold, why."""
    cells = [
        (machine, found["text"], "holds" if found["holds"] else "FAILS", found["counts"])
        for machine, found in rows
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *cells, strict=True)]
    lines = [_line(_COLUMNS, widths)]
    for cell, (_, found) in zip(cells, rows, strict=True):
        lines.append(_line(cell, widths))
        if not found["holds"]:
            lines += [f"    {why}" for why in found["why"][:_SHOWN]]
            if (more := len(found["why"]) - _SHOWN) > 0:
                lines.append(f"    and {more} more")
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(map(str.ljust, cells, widths)).rstrip()


if __name__ == "__main__":
    sys.exit(main())
