"""The published figures of the test bed (arXiv 2606.10493) beside those simulated for it.

Every figure comes from plans compiled for the named machines and from nothing but their phases.
Machines say which of their constants were fitted to which figures: a figure that a constant was
fitted to is a calibration, the others are independent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hmc.compiler import compile as compile_plan
from hmc.machine.detect import load_machine
from hmc.machine.model import Machine
from hmc.plan import Plan
from hmc.plan.phases import DUAL, STREAM
from hmc.predict.cost import Call, CostModel, gemv_rate
from hmc.predict.run import run_decode, run_prefill
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


class _Bed:
    """One model on one machine of the test bed; its plan is the same at any `peak`."""

    def __init__(self, model: str, machine: str, context: int, peak: bool) -> None:
        self.plan = _plan(model, machine, context)
        on = self.plan.machine
        self.model = CostModel(self.plan, on.at_peak() if peak else on)

    def ttft(self, tokens: int) -> float:
        """Seconds to the first token of a prompt."""
        return run_prefill(self.plan, self.model, tokens).seconds

    def streaming(self, tokens: int) -> float:
        """Seconds in which weights stream for a prompt."""
        return run_prefill(self.plan, self.model, tokens).busy["h2d0"]

    def rate(self, context: int, batch: int = 1, phase: str = "") -> float:
        """Tokens a second in total."""
        return batch / run_decode(self.plan, self.model, context, batch, phase).seconds

    def dual(self, batch: int, context: int = _SHORT) -> float:
        """The same, in two lanes."""
        return self.rate(context, batch, DUAL)

    def gain(self, batch: int) -> float:
        """What two lanes give over one request."""
        return self.dual(batch) / self.rate(_SHORT)

    def ring(self) -> float:
        """GB of the slots that experts stream through, of one GPU."""
        phase = self.plan.phase(STREAM)
        return sum(slot.bytes for slot in phase.slots if slot.name.startswith("ring0")) / 1e9

    def switch(self) -> float:
        """Prompt tokens from which on streaming is used."""
        return next(each.tokens for each in self.plan.switches if each.phase == STREAM)

    def stage(self, *resources: str) -> float:
        """Microseconds of a decode layer's steps on these resources."""
        phase = self.plan.phase("decode")
        timeline = run(phase, Call(1, _SHORT, 1), self.model)
        layer = self.plan.model.layers // 2
        return 1e6 * sum(
            cost.seconds
            for step, cost in zip(phase.steps, timeline.costs, strict=True)
            if step.layer == layer and step.resource in resources
        )

    def gemv(self, rows: int, columns: int) -> float:
        """Microseconds of one FP8 matrix in decode, without what a record adds."""
        return 1e6 * rows * columns / gemv_rate(self.plan.machine.known_rates, "fp8", 1)


@lru_cache(maxsize=8)
def _plan(model: str, machine: str, context: int) -> Plan:
    return compile_plan(
        MODELS / f"{model}.json", machine=machine, max_context=context, dummy_weights=True
    )


class _Beds:
    """The test bed: one and two GPUs with DeepSeek-V3, and one with other models."""

    def __init__(self, peak: bool) -> None:
        self.one = _Bed("deepseek-v3", ONE, 32 * K, peak)
        self.two = _Bed("deepseek-v3", TWO, 45 * K, peak)
        self.int4 = _Bed("deepseek-v3-int4", ONE, 128 * K, peak)
        self.kimi = _Bed("kimi-k2", ONE, 32 * K, peak)


_PUBLISHED = (
    ("prefill.20k.1gpu", 1200, "tok/s", "prefill of 20K, one GPU (SLP)"),
    ("prefill.32k.1gpu", 30, "s", "time to first token of 32K, one GPU (SLP)"),
    ("prefill.stream_fixed", 13, "s", "streaming the whole model once, one GPU"),
    ("prefill.32k.2gpu", 1800, "tok/s", "prefill of 32K, two GPUs (DSLP)"),
    ("prefill.45k.2gpu", 30, "s", "time to first token of 45K, two GPUs (DSLP)"),
    ("prefill.20k.ratio", 0.648, "x", "time at 20K, two GPUs against one (0.79 x 0.82)"),
    ("prefill.speedup.2gpu", 1.64, "x", "DSLP against SLP at 32K"),
    (
        "prefill.switch",
        4 * K,
        "tokens",
        "prompt length from which weights are streamed, one GPU",
    ),
    ("ring.deepseek-v3", 11.3, "GB", "expert ring of DeepSeek-V3"),
    ("ring.kimi-k2", 16.9, "GB", "expert ring of Kimi-K2"),
    ("gemv.7168x2048", 15.5, "us", "FP8 GEMV 7168 x 2048 on the CPU"),
    ("decode.gpu_stage", 350, "us", "GPU's part of a decode layer"),
    ("decode.cpu_stage", 450, "us", "CPU's part of a decode layer"),
    ("decode.fp8", 21.5, "tok/s", "decode, FP8, short"),
    ("decode.fp8.32k", 20, "tok/s", "decode, FP8, context 32K"),
    ("decode.kimi-k2", 22.4, "tok/s", "decode, Kimi-K2 FP8"),
    ("decode.int4", 28, "tok/s", "decode, 4-bit (Q4_K_M published; groups of 32 here), 4K"),
    ("decode.int4.128k", 19, "tok/s", "decode, 4-bit, context 128K"),
    ("decode.batch2", 33.6, "tok/s", "two requests in two lanes, total"),
    ("decode.batch2.32k", 31.1, "tok/s", "two requests in two lanes at 32K, total"),
    ("decode.batch2.ratio", 1.56, "x", "two requests against one"),
    ("decode.batch4.ratio", 1.58, "x", "four requests against one"),
    ("decode.batch6.ratio", 1.61, "x", "six requests against one"),
)

_SIMULATED: dict[str, Callable[[_Beds], float]] = {
    "prefill.20k.1gpu": lambda at: 20 * K / at.one.ttft(20 * K),
    "prefill.32k.1gpu": lambda at: at.one.ttft(32 * K),
    "prefill.stream_fixed": lambda at: at.one.streaming(20 * K),
    "prefill.32k.2gpu": lambda at: 32 * K / at.two.ttft(32 * K),
    "prefill.45k.2gpu": lambda at: at.two.ttft(45 * K),
    "prefill.20k.ratio": lambda at: at.two.ttft(20 * K) / at.one.ttft(20 * K),
    "prefill.speedup.2gpu": lambda at: at.one.ttft(32 * K) / at.two.ttft(32 * K),
    "prefill.switch": lambda at: at.one.switch(),
    "ring.deepseek-v3": lambda at: at.one.ring(),
    "ring.kimi-k2": lambda at: at.kimi.ring(),
    "gemv.7168x2048": lambda at: at.one.gemv(7168, 2048),
    "decode.gpu_stage": lambda at: at.one.stage("gpu0", "h2d0", "d2h0"),
    "decode.cpu_stage": lambda at: at.one.stage("cpu"),
    "decode.fp8": lambda at: at.one.rate(_SHORT),
    "decode.fp8.32k": lambda at: at.one.rate(32 * K),
    "decode.kimi-k2": lambda at: at.kimi.rate(_SHORT),
    "decode.int4": lambda at: at.int4.rate(_INT4_CONTEXT),
    "decode.int4.128k": lambda at: at.int4.rate(128 * K),
    "decode.batch2": lambda at: at.one.dual(2),
    "decode.batch2.32k": lambda at: at.one.dual(2, 32 * K),
    "decode.batch2.ratio": lambda at: at.one.gain(2),
    "decode.batch4.ratio": lambda at: at.one.gain(4),
    "decode.batch6.ratio": lambda at: at.one.gain(6),
}


def rows(peak: bool = False) -> list[Row]:
    """Every published figure with ours, with GPUs as they are expected to be or at the `peak` that
    their data sheets give; takes the compilation of four plans.
    """
    machines = [load_machine(name) for name in (ONE, TWO)]
    fitted = frozenset().union(*(fitted_figures(m.at_peak() if peak else m) for m in machines))
    beds = _Beds(peak)
    found = []
    for metric, published, unit, what in _PUBLISHED:
        simulated = _SIMULATED[metric](beds)
        kind = "calibrated" if metric in fitted else "independent"
        error = simulated / published - 1
        found.append(Row(metric, what, unit, published, simulated, error, kind))
    return found


def fitted_figures(machine: Machine) -> frozenset[str]:
    """Names of the figures that some constant of a machine was fitted to."""
    lists = re.findall(r'"fitted_to":\[([^\]]+)\]', machine.model_dump_json())
    return frozenset(name for names in lists for name in json.loads(f"[{names}]"))
