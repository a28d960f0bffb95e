"""Searches settings on this machine: one change after the other, each against the best so far.

A change is kept only when its rate, interleaved with the old one's, is at least `WORTHWHILE` times
that in the median, is so again in a second, longer comparison of which it wins four turns in five,
and greedy output is the same. Every change that was tried is a decision of the plan, kept or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from hmc.bench.compare import Compared, Report, silent
from hmc.errors import HmcError
from hmc.machine.detect import detect
from hmc.plan import Plan
from hmc.plan.phases import PREFILL, prefill_phase
from hmc.predict.measured import Measured
from hmc.tune.measure import Runner, compare
from hmc.tune.settings import (
    DECODE_OPS,
    PREFILL_OPS,
    Setting,
    apply,
    current,
    decided,
    ops_of,
    ring_of,
)

WORTHWHILE = 1.03
WINS = 0.8
"""Turns of the second comparison that a change must win: noise wins half of them."""
_PREFETCH = (0, 2048, 4096, 8192, 16384, 32768)
_ROWS_STREAMS = ((2, 4), (4, 2), (2, 8), (8, 2))
_CHUNKS = (256, 1024, 2048)
_TILE_TOKENS = (6, 8, 10)

MakeRunner = Callable[[Plan], Runner]
Settings = tuple[Setting, ...]


@dataclass(frozen=True)
class Trial:
    """One change, and why it was kept or not. `ratios` are those of the comparisons that were made;
    `before` and `after` tokens/s of the last of them."""

    change: str
    kind: str
    why: str
    ratios: tuple[float, ...] = ()
    before: float = 0.0
    after: float = 0.0
    kept: bool = False


@dataclass(frozen=True)
class Found:
    """The tuned plan, with its decisions; every trial; and what the result was last measured at."""

    plan: Plan
    trials: tuple[Trial, ...]
    measured: tuple[Measured, ...]


def search(
    plan: Plan,
    make: MakeRunner,
    *,
    repetitions: int = 5,
    report: Report = silent,
    checkpoint: str = "",
) -> Found:
    """The best plan that single changes lead to; `make` gives a runner of a plan."""
    groups = list(candidates(plan))
    total = sum(len(changes) for _, changes in groups)
    trials: list[Trial] = []
    best = make(plan)
    try:
        expected = best.greedy()
        for kind, changes in groups:
            for settings in changes:
                report("tune", len(trials), total)
                if _idle(best, settings):
                    continue
                trial, runner = _try(best, settings, kind, expected, make, repetitions, checkpoint)
                trials.append(trial)
                if runner is not None:
                    best.close()
                    best = runner
        report("tune", total, total)
        tuned = best.plan
        for trial in trials:
            choice = "kept" if trial.kept else "not kept"
            tuned = decided(tuned, trial.change, choice, trial.why)
        measured = tuple(_measured(best, kind, repetitions) for kind in ("prefill", "decode"))
    finally:
        best.close()
    return Found(tuned, tuple(trials), measured)


def _idle(best: Runner, settings: Settings) -> bool:
    """Whether a change changes nothing of what is measured."""
    prompt, _ = best.loads
    if settings[0].name == "ring" and prefill_phase(best.plan, prompt) == PREFILL:
        return True
    if settings[0].name == "chunk":
        chunks = best.plan.limits.max_chunk
        return -(-prompt // settings[0].value) == -(-prompt // chunks)
    return all(current(best.plan, each) == each.value for each in settings)


def candidates(plan: Plan) -> Iterator[tuple[str, list[Settings]]]:
    """Changes to try, with the rate that judges them."""
    cores = detect().cores
    threads = sorted({max(1, cores // 2), max(1, cores - 1), cores} - {plan.threads})
    yield "decode", [(Setting("threads", count),) for count in threads]
    decode, prefill = list(ops_of(plan, DECODE_OPS)), list(ops_of(plan, PREFILL_OPS))
    if decode:
        yield "decode", [_each(decode, prefetch=size) for size in _PREFETCH]
        yield "decode", [_each(decode, rows=r, streams=s) for r, s in _ROWS_STREAMS]
    chunks = [each for each in _CHUNKS if each <= plan.limits.max_context]
    yield "prefill", [(Setting("chunk", each),) for each in chunks]
    ring = ring_of(plan)
    if ring is not None:
        rings = dict.fromkeys((max(2, ring // 2), 2 * ring))
        yield "prefill", [(Setting("ring", each),) for each in rings]
    if prefill:
        yield "prefill", [_each(prefill, tokens=each) for each in _TILE_TOKENS]


def _each(ops: Sequence[str], **values: int) -> Settings:
    """The same tile choices for several ops."""
    return tuple(Setting(name, value, op) for op in ops for name, value in values.items())


def _try(
    best: Runner,
    settings: Settings,
    kind: str,
    expected: list[list[int]],
    make: MakeRunner,
    repetitions: int,
    checkpoint: str,
) -> tuple[Trial, Runner | None]:
    """One change: its trial, and its runner where it is kept."""
    change = _words(settings)
    try:
        runner = make(apply(best.plan, settings, checkpoint))
    except HmcError as error:
        return Trial(change, kind, f"cannot run: {error}"), None
    kept = False
    try:
        if runner.greedy() != expected:
            return Trial(change, kind, "greedy output differs from the plan's"), None
        found = [compare(runner, best, kind, repetitions)]
        if found[0].ratio >= WORTHWHILE:
            found.append(compare(runner, best, kind, 2 * repetitions))
        kept = len(found) == 2 and found[1].ratio >= WORTHWHILE and won(found[1]) >= WINS
        return _trial(change, kind, found, kept), runner if kept else None
    finally:
        if not kept:
            runner.close()


def won(found: Compared) -> float:
    """Share of the turns in which the new plan was faster than the old one around it."""
    return sum(each > 1 for each in found.quotients) / len(found.values)


def _trial(change: str, kind: str, found: list[Compared], kept: bool) -> Trial:
    last = found[-1]
    counted = ", then ".join(
        f"{each.ratio - 1:+.1%} winning {won(each):.0%} of {len(each.values)} turns"
        for each in found
    )
    why = (
        f"{kind} {last.reference:.2f} -> {last.value:.2f} tokens/s: {counted}; greedy output"
        " unchanged"
    )
    ratios = tuple(each.ratio for each in found)
    return Trial(change, kind, why, ratios, last.reference, last.value, kept)


def _measured(runner: Runner, kind: str, repetitions: int) -> Measured:
    runner.rate(kind)
    rates = [runner.rate(kind) for _ in range(repetitions)]
    prompt, context = runner.loads
    machine = detect()
    return Measured(
        kind="prefill" if kind == "prefill" else "decode",
        tokens=prompt if kind == "prefill" else context,
        tokens_per_second=median(rates),
        low=min(rates),
        high=max(rates),
        machine=f"{machine.cpu}, {machine.cores} cores",
        by="hmc tune",
    )


def _words(settings: Settings) -> str:
    """Settings alike but for their op as one: `linear, gate_up: rows=2 streams=4`."""
    if not settings[0].op:
        return " ".join(map(str, settings))
    ops = dict.fromkeys(each.op for each in settings)
    values = dict.fromkeys(f"{each.name}={each.value}" for each in settings)
    return f"{', '.join(ops)}: {' '.join(values)}"
