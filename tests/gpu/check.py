"""The GPU check, one script: `make gpu-check`, or `PYTHONPATH=tests python -m gpu.check`.

Probes the machine, compares what the GPU computes with what the CPU does, times streamed prompts,
hybrid decoding, ring lengths and FP8 products beside references and predictions of the same run,
and prints one table. `--devices host` lets the CPU play the GPU at reduced sizes.

Exit code 1 where anything was wrong or left out. Goals of speed that a machine misses are marked,
and change nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gpu.decode import decode
from gpu.models import DEEPSEEK, QWEN
from gpu.parity import parity
from gpu.products import products
from gpu.rows import Clock, Row, Section, run_sections, sound, text_table
from gpu.sizes import FULL, SMALL, Bench, Choice, Sizes
from gpu.stream import rings, stream
from hmc.bench.probe import probe
from hmc.bench.probe.gpu import Device, gpu_rates, probe_gpus
from hmc.errors import HmcError, MachineError
from hmc.files import write_beside
from hmc.machine.detect import load_machine
from hmc.machine.model import Gpu, Machine

TOTAL_SECONDS = 540.0
"""No section begins anything after this."""
_FORMATS = ("fp8", "bf16")


def measured_machine(sizes: Sizes, devices: Choice, rates: str | None) -> Machine:
    """This machine with one GPU and the rates of both sides as measured now (or the CPU's from the
    machine file `rates`)."""
    machine = load_machine(rates) if rates else probe(sizes.effort, formats=_FORMATS).machine
    if machine.rates is None:
        raise MachineError(f"--rates {rates}: that machine declares no rates (`hmc probe`)")
    if devices == "cuda":
        gpus = machine.gpus if not rates else probe_gpus(sizes.effort)[0]
    else:
        found = Device(torch.device("cpu"), sizes.effort).measure()
        gpus = (
            Gpu(
                name="played by the CPU",
                memory_bytes=sizes.played,
                rates=gpu_rates(found),
            ),
        )
    return machine.model_copy(update={"gpus": gpus[:1]})


def sections(bench: Bench) -> list[Section]:
    """Everything after the probe, with seconds for each; models one after the other, so that the
    weights of each are made once."""
    found = [
        Section("products", 30, partial(products, bench)),
        Section("parity", 120, partial(parity, bench)),
    ]
    for name in (QWEN, DEEPSEEK):
        found += [
            Section(f"stream {name}", 90, partial(stream, bench, name)),
            Section(f"decode {name}", 60, partial(decode, bench, name)),
        ]
        if name == QWEN:
            found.append(Section(f"ring {name}", 80, partial(rings, bench, name)))
    return found


def check(
    sizes: Sizes, devices: Choice, *, rates: str | None = None, seconds: float = TOTAL_SECONDS
) -> list[Row]:
    """All rows. Raises `MachineError` where there is no GPU for "cuda"; what goes wrong later is
    told by rows."""
    if devices == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "PyTorch finds no GPU here: see `nvidia-smi` and whether this PyTorch has CUDA; with"
            " --devices host the CPU plays one"
        )
    began = time.monotonic()
    benches: list[Bench] = []

    def probed(clock: Clock) -> Iterator[Row]:
        machine = measured_machine(sizes, devices, rates)
        benches.append(Bench(machine, sizes, devices, Path(folder)))
        gpu = machine.gpus[0]
        assert gpu.rates is not None
        for name in ("h2d", "d2h", "memory", "bf16", "fp8", "attention"):
            rate = getattr(gpu.rates, name)
            if rate is None:  # a card without FP8 units
                continue
            unit = "B/s" if name in ("h2d", "d2h", "memory") else "FLOP/s"
            yield Row("probe", gpu.name, name, rate.value, unit, note=f"± {rate.spread:.1%}")

    with TemporaryDirectory(prefix="hmc-gpu-check-") as folder:
        rows = run_sections([Section("probe", 90, probed)], seconds, _report)
        for bench in benches:
            try:
                left = seconds - (time.monotonic() - began)
                rows += run_sections(sections(bench), left, _report)
            finally:
                bench.close()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and print its table; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gpu.check", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--devices", choices=("cuda", "host"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="reduced models")
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file, too")
    parser.add_argument("--rates", metavar="FILE", help="a machine file with the CPU's rates")
    found = parser.parse_args(arguments)
    devices: Choice = found.devices
    sizes = SMALL if found.quick or devices == "host" else FULL
    began = time.monotonic()
    try:
        rows = check(sizes, devices, rates=found.rates)
        if found.json:
            told = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "devices": devices,
                "torch": torch.__version__,
                "rows": [row.as_json() for row in rows],
            }
            write_beside(found.json, json.dumps(told, indent=1) + "\n")
    except HmcError as error:
        print(f"gpu-check: error: {error}", file=sys.stderr)
        return error.exit_code
    title = f"GPU check, {devices}, {time.monotonic() - began:.0f} s"
    print(f"{title}\n\n{text_table(rows)}")
    return 0 if sound(rows) else 1


def _report(line: str) -> None:
    print(f"[{line}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
