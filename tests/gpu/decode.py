"""Section of the GPU check: decoding by GPU and CPU together beside what each takes alone, and two
lanes beside one; with the GPU's steps handed over as graphs and one by one.

What a side takes alone is the busy time of its stream in recorded steps of the same run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from gpu.plans import only, resident
from gpu.rows import Clock, Row
from gpu.sizes import Bench, token_ids
from hmc.errors import ExecutionError
from hmc.plan.phases import DECODE, DUAL, PREFILL
from hmc.predict.cost import CostModel
from hmc.predict.run import run_decode
from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import Sequence as CacheSequence
from hmc.runtime.phases.decode_graphs import FIRST
from hmc.runtime.phases.phase import DevicePhase

_BATCHES = (1, 2, 4)
_WARM = FIRST + 2


@dataclass(frozen=True)
class Decoded:
    """A step: seconds as a whole (with graphs where there are any), without graphs (0 where there
    are none), and busy seconds of GPU and CPU; medians."""

    seconds: float
    single: float
    gpu: float
    cpu: float


def measure_steps(executor: Executor, phase: str, batch: int, steps: int) -> Decoded:
    """`steps` decode steps of `batch` sequences, as many recorded after as many that are not (and
    as many without graphs)."""
    found = executor.phases[phase]
    if not isinstance(found, DevicePhase):
        raise ExecutionError(f"{phase} does not run on devices here")
    places = found.bound.phase.steps
    sequences = _opened(executor, batch)
    graphs, single = found.graphs, [0.0]
    try:
        seconds = _steps(executor, sequences, phase, steps)
        if graphs is not None and not graphs.refused:
            found.graphs = None
            single = _steps(executor, sequences, phase, steps)
        busy: dict[str, list[float]] = {"gpu0": [], "cpu": []}
        with executor.recorded():
            for number in range(steps):
                _step(executor, sequences, phase, number)
                call = found.last
                assert call is not None
                for name, each in busy.items():
                    spans = zip(places, call.start, call.finish, strict=True)
                    each.append(sum(b - a for step, a, b in spans if step.resource == name))
    finally:
        found.graphs = graphs
        for sequence in sequences:
            executor.release(sequence)
    return Decoded(median(seconds), median(single), median(busy["gpu0"]), median(busy["cpu"]))


def decode(bench: Bench, name: str, clock: Clock) -> Iterator[Row]:
    """One sequence, then batches in one lane and in two."""
    section = f"decode {name}"
    clock.check("compiling")
    plan = bench.model(name, 2 * bench.sizes.chunk).divided(DECODE, DUAL)
    model = CostModel(plan, bench.machine)
    held = f"{resident(plan):.0%} of the experts resident"
    with bench.running(name, only(plan, PREFILL, DECODE, DUAL)) as executor:
        for batch in _BATCHES:
            single = 0.0
            for phase in (DECODE, DUAL) if batch > 1 else (DECODE,):
                clock.check(f"{phase} of {batch}")
                found = measure_steps(executor, phase, batch, bench.sizes.decode_steps)
                rate = batch / found.seconds
                case = f"{phase}, batch {batch}"

                def row(
                    against: str,
                    reference: float,
                    note: str = "",
                    case: str = case,
                    rate: float = rate,
                ) -> Row:
                    return Row(section, case, "tokens", rate, "tok/s", against, reference, "", note)

                yield row("GPU part alone", batch / found.gpu, held)
                yield row("CPU part alone", batch / found.cpu)
                if found.single:
                    yield row("without graphs", batch / found.single)
                if phase == DUAL:
                    yield row("one lane", single)
                predicted = run_decode(plan, model, bench.sizes.chunk, batch, phase).seconds
                yield row("predicted", batch / predicted)
                single = rate


def _opened(executor: Executor, batch: int) -> list[CacheSequence]:
    """Sequences with a chunk of context."""
    sequences = [executor.open() for _ in range(batch)]
    for seed, sequence in enumerate(sequences):
        ids = token_ids(executor.plan.limits.max_chunk, executor.plan.model.vocab, seed)
        for _ in executor.prefill(sequence, ids, phase=PREFILL):
            pass
    return sequences


def _steps(
    executor: Executor, sequences: list[CacheSequence], phase: str, steps: int
) -> list[float]:
    """Seconds of each step, after some that warm up."""
    return [_step(executor, sequences, phase, n) for n in range(_WARM + steps)][_WARM:]


def _step(executor: Executor, sequences: list[CacheSequence], phase: str, seed: int) -> float:
    tokens = token_ids(len(sequences), executor.plan.model.vocab, seed)
    start = time.perf_counter()
    executor.decode(sequences, tokens, phase)
    return time.perf_counter() - start
