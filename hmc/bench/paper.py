"""The published figures of the test bed (arXiv 2606.10493) beside those simulated for it.

Every figure comes from plans compiled for the named machines and from nothing but their phases.
Machines say which of their constants were fitted to which figures: a figure that a constant was
fitted to is a calibration, the others are independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hmc.compiler import compile as compile_plan
from hmc.machine import CpuRates, GpuRates, Machine, Rate
from hmc.machine.detect import load_machine
from hmc.plan import Plan
from hmc.plan.phases import DUAL, STREAM
from hmc.predict.cost import Call, CostModel, gemv_rate
from hmc.predict.run import Run, run_decode, run_prefill
from hmc.predict.timeline import run

ONE, TWO = "epyc9355-rtx5090", "epyc9355-rtx5090x2"
MODELS = Path(__file__).parent / "models"
K = 1024
_SHORT, _INT4_CONTEXT = K, 4 * K


@dataclass(frozen=True)
class Row:
    """One figure: `error` is simulated / published - 1; `kind` calibrated or independent."""

    metric: str
    what: str
    unit: str
    published: float
    simulated: float
    error: float
    kind: str

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return dict(vars(self))


class _Bed:
    """One model on one machine of the test bed."""

    def __init__(self, model: str, machine: str, context: int) -> None:
        self.plan: Plan = compile_plan(
            MODELS / f"{model}.json", machine=machine, max_context=context, dummy_weights=True
        )
        self.model = CostModel(self.plan)

    def prefill(self, tokens: int) -> Run:
        return run_prefill(self.plan, self.model, tokens)

    def rate(self, context: int, batch: int = 1, phase: str = "") -> float:
        """Tokens a second in total."""
        return batch / run_decode(self.plan, self.model, context, batch, phase).seconds

    def ring(self) -> float:
        """GB of the slots that experts stream through, of one GPU."""
        phase = self.plan.phase(STREAM)
        return sum(slot.bytes for slot in phase.slots if slot.name.startswith("ring0")) / 1e9

    def switch(self) -> float:
        """Prompt tokens from which on streaming is used."""
        return next(each.tokens for each in self.plan.switches if each.phase == STREAM)

    def stage(self, resource: str) -> float:
        """Microseconds of a decode layer's steps on one resource; with the copies on the GPU's."""
        phase = self.plan.phase("decode")
        timeline = run(phase, Call(1, _SHORT, 1), self.model)
        layer = self.plan.model.layers // 2
        names = ("cpu",) if resource == "cpu" else ("gpu0", "h2d0", "d2h0")
        return 1e6 * sum(
            cost.seconds
            for step, cost in zip(phase.steps, timeline.costs, strict=True)
            if step.layer == layer and step.resource in names
        )

    def gemv(self, rows: int, columns: int) -> float:
        """Microseconds of one FP8 matrix in decode, without what a record adds."""
        rates = self.plan.machine.rates
        assert rates is not None
        return 1e6 * rows * columns / gemv_rate(rates, "fp8", 1)


@lru_cache(maxsize=8)
def _bed(model: str, machine: str, context: int) -> _Bed:
    return _Bed(model, machine, context)


def _deepseek(gpus: int) -> _Bed:
    return _bed("deepseek-v3", ONE, 32 * K) if gpus == 1 else _bed("deepseek-v3", TWO, 45 * K)


def _int4() -> _Bed:
    return _bed("deepseek-v3-int4", ONE, 128 * K)


def _kimi() -> _Bed:
    return _bed("kimi-k2", ONE, 32 * K)


def _dual(batch: int, context: int = _SHORT) -> float:
    return _deepseek(1).rate(context, batch, DUAL)


def _gain(batch: int) -> float:
    return _dual(batch) / _deepseek(1).rate(_SHORT)


_FIGURES: tuple[tuple[str, str, str, float, Callable[[], float]], ...] = (
    (
        "prefill.20k.1gpu",
        "prefill of 20K, one GPU (SLP)",
        "tok/s",
        1200,
        lambda: 20 * K / _deepseek(1).prefill(20 * K).seconds,
    ),
    (
        "prefill.32k.1gpu",
        "time to first token of 32K, one GPU (SLP)",
        "s",
        30,
        lambda: _deepseek(1).prefill(32 * K).seconds,
    ),
    (
        "prefill.stream_fixed",
        "streaming the whole model once, one GPU",
        "s",
        13,
        lambda: _deepseek(1).prefill(20 * K).busy["h2d0"],
    ),
    (
        "prefill.32k.2gpu",
        "prefill of 32K, two GPUs (DSLP)",
        "tok/s",
        1800,
        lambda: 32 * K / _deepseek(2).prefill(32 * K).seconds,
    ),
    (
        "prefill.45k.2gpu",
        "time to first token of 45K, two GPUs (DSLP)",
        "s",
        30,
        lambda: _deepseek(2).prefill(45 * K).seconds,
    ),
    (
        "prefill.20k.ratio",
        "time at 20K, two GPUs against one (0.79 x 0.82)",
        "x",
        0.648,
        lambda: _deepseek(2).prefill(20 * K).seconds / _deepseek(1).prefill(20 * K).seconds,
    ),
    (
        "prefill.speedup.2gpu",
        "DSLP against SLP at 32K",
        "x",
        1.64,
        lambda: _deepseek(1).prefill(32 * K).seconds / _deepseek(2).prefill(32 * K).seconds,
    ),
    (
        "prefill.switch",
        "prompt length from which on weights are streamed, one GPU",
        "tokens",
        4 * K,
        lambda: _deepseek(1).switch(),
    ),
    ("ring.deepseek-v3", "expert ring of DeepSeek-V3", "GB", 11.3, lambda: _deepseek(1).ring()),
    ("ring.kimi-k2", "expert ring of Kimi-K2", "GB", 16.9, lambda: _kimi().ring()),
    (
        "gemv.7168x2048",
        "FP8 GEMV 7168 x 2048 on the CPU",
        "us",
        15.5,
        lambda: _deepseek(1).gemv(7168, 2048),
    ),
    (
        "decode.gpu_stage",
        "GPU's part of a decode layer",
        "us",
        350,
        lambda: _deepseek(1).stage("gpu0"),
    ),
    (
        "decode.cpu_stage",
        "CPU's part of a decode layer",
        "us",
        450,
        lambda: _deepseek(1).stage("cpu"),
    ),
    ("decode.fp8", "decode, FP8, short", "tok/s", 21.5, lambda: _deepseek(1).rate(_SHORT)),
    (
        "decode.fp8.32k",
        "decode, FP8, context 32K",
        "tok/s",
        20,
        lambda: _deepseek(1).rate(32 * K),
    ),
    ("decode.kimi-k2", "decode, Kimi-K2 FP8", "tok/s", 22.4, lambda: _kimi().rate(_SHORT)),
    (
        "decode.int4",
        "decode, 4-bit (Q4_K_M published; groups of 32 here), 4K",
        "tok/s",
        28,
        lambda: _int4().rate(_INT4_CONTEXT),
    ),
    (
        "decode.int4.128k",
        "decode, 4-bit, context 128K",
        "tok/s",
        19,
        lambda: _int4().rate(128 * K),
    ),
    ("decode.batch2", "two requests in two lanes, total", "tok/s", 33.6, lambda: _dual(2)),
    (
        "decode.batch2.32k",
        "two requests in two lanes at 32K, total",
        "tok/s",
        31.1,
        lambda: _dual(2, 32 * K),
    ),
    ("decode.batch2.ratio", "two requests against one", "x", 1.56, lambda: _gain(2)),
    ("decode.batch4.ratio", "four requests against one", "x", 1.58, lambda: _gain(4)),
    ("decode.batch6.ratio", "six requests against one", "x", 1.61, lambda: _gain(6)),
)


def rows() -> list[Row]:
    """Every published figure with ours; takes the compilation of five plans."""
    fitted = fitted_figures(load_machine(ONE)) | fitted_figures(load_machine(TWO))
    found = []
    for metric, what, unit, published, figure in _FIGURES:
        simulated = figure()
        found.append(
            Row(
                metric,
                what,
                unit,
                published,
                simulated,
                simulated / published - 1,
                "calibrated" if metric in fitted else "independent",
            )
        )
    return found


def fitted_figures(machine: Machine) -> frozenset[str]:
    """Names of the figures that some constant of a machine was fitted to."""
    rates: list[Rate] = []
    sides: list[CpuRates | GpuRates | None] = [machine.rates, *(gpu.rates for gpu in machine.gpus)]
    for side in sides:
        for value in vars(side).values() if side is not None else ():
            if isinstance(value, Rate):
                rates.append(value)
            elif isinstance(value, tuple):
                rates.extend(each if isinstance(each, Rate) else each.rate for each in value)
    return frozenset(name for rate in rates for name in rate.fitted_to)
