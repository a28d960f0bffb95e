"""How much a busy process on one core slows decode steps down: `python tests/hog.py`.

Blocks of steps take turns, without the hog and with it, on the last of the workers' CPUs. Prints
milliseconds of a step (p50, p99) of both, and the quotient of the p99.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np

import hmc
from hmc.bench.model import opened
from hmc.runtime.executor import Executor

MODEL = Path(__file__).parents[1] / "examples/configs/qwen3-30b-a3b-fp8"
HOG = "import os\nos.sched_setaffinity(0, {%d})\nprint(flush=True)\nwhile True: pass"


def timed(executor: Executor, ids: np.ndarray) -> list[float]:
    """Seconds of a decode step for each of `ids`, in a sequence of their own."""
    seconds = []
    with opened(executor, [ids[:0]]) as sequences:
        for each in ids:
            start = time.perf_counter()
            executor.decode(sequences, each[None], "decode")
            seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__)
    told.add_argument("--layers", type=int, default=3)
    told.add_argument("--steps", type=int, default=100, help="of a block")
    told.add_argument("--blocks", type=int, default=6, help="of either kind")
    asked = told.parse_args()
    plan = hmc.compile(MODEL, dummy_weights=True, layers=asked.layers, max_context=512)
    random = np.random.default_rng(0)
    found: dict[bool, list[float]] = {False: [], True: []}
    with closing(Executor(plan, MODEL, dummy_weights=True)) as executor:
        timed(executor, random.integers(0, plan.model.vocab, asked.steps, np.int32))
        for block in range(2 * asked.blocks):
            ids = random.integers(0, plan.model.vocab, asked.steps, np.int32)
            if not block % 2:
                found[False] += timed(executor, ids)
                continue
            code = HOG % executor.pool.cpus[-1]
            with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as hog:
                assert hog.stdout is not None
                hog.stdout.readline()
                try:
                    found[True] += timed(executor, ids)
                finally:
                    hog.kill()
    p99 = {}
    for hogged, seconds in found.items():
        p50, p99[hogged] = (float(np.percentile(seconds, at)) * 1e3 for at in (50, 99))
        name = "with the hog" if hogged else "without"
        print(f"{name:13} p50 {p50:7.2f} ms  p99 {p99[hogged]:7.2f} ms")
    print(f"p99: {p99[True] / p99[False]:.2f} times; {executor.pool.workers} workers,")
    print(f"load {os.getloadavg()[0]:.1f} with what else this machine does")


if __name__ == "__main__":
    main()
