"""Service goals: how they are written; those that a plan cannot meet are refused, with the limit
that binds and what would lift it.

The limit is the busiest resource of the phase that misses the goal. What would lift it is computed
with the same prediction: the longest prompt, the fewest sequences or the factor on the limit's rate
that meets the goal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hmc.errors import CapacityError, UsageError
from hmc.machine.model import CpuRates, GpuRates, Machine
from hmc.plan import Goals, Plan
from hmc.predict.cost import TRANSFERS, CostModel
from hmc.predict.run import Run, run_decode, run_prefill, verdicts

_GOAL = re.compile(
    r"(ttft=(?P<seconds>\d+(\.\d+)?)(?P<unit>ms|s)?|tps=(?P<rate>\d+(\.\d+)?))"
    r"(@(?P<tokens>\d+)(?P<k>[kK])?)?"
)
_SHORT = 1024
"""Tokens of context at which a rate is asked for that names none."""


def parse_goals(text: str, concurrency: int = 1, *, lengths: bool = True) -> Goals:
    """Goals such as "ttft=30s@32k,tps=20" or "tps=20@32k": seconds to the first token of a prompt
    of 32 x 1024 tokens, tokens a second of each of `concurrency` sequences at a context (1,024
    tokens if none is named); without `lengths`, of all prompts and contexts: "ttft=30s,tps=20".
    `UsageError` for another form.
    """
    found: dict[str, float | int] = {"concurrency": concurrency}
    for part in filter(None, (each.strip() for each in text.split(","))):
        match = _GOAL.fullmatch(part)
        named = match is not None and match["tokens"] is not None
        if match is None or (named if not lengths else match["seconds"] and not named):
            raise UsageError(f"--slo {part}: write goals as ttft=30s{'@32k' * lengths},tps=20")
        tokens = int(match["tokens"] or _SHORT) * (1024 if match["k"] else 1)
        if match["seconds"]:
            seconds = float(match["seconds"]) / (1000 if match["unit"] == "ms" else 1)
            found |= {"ttft_seconds": seconds, "ttft_prompt": tokens}
        else:
            found |= {"tokens_per_second": float(match["rate"]), "tokens_context": tokens}
    return Goals.model_validate(found)


_FASTEST = 64.0
"""Up to which factor on a rate a way out is looked for."""


@dataclass(frozen=True)
class _Limit:
    """A resource that binds: in words, what machine would lift it, which of its rates, and which
    other machine would need less of it."""

    what: str
    lift: str
    rates: tuple[str, ...]
    room: str = ""


def require_goals(plan: Plan) -> None:
    """Raise `CapacityError` on the first of the plan's goals that its prediction misses."""
    goals = plan.goals
    if not goals.ttft_seconds and not goals.tokens_per_second:
        return
    model = CostModel(plan)

    def prefill(using: CostModel) -> Run:
        return run_prefill(plan, using, goals.ttft_prompt)

    def decode(using: CostModel) -> Run:
        return run_decode(plan, using, goals.tokens_context, goals.concurrency)

    for verdict in verdicts(plan, model):
        if verdict.met:
            continue
        if verdict.unit == "s":
            measure, wanted = prefill, goals.ttft_seconds
            lifts = _shorter(plan, model, wanted, goals.ttft_prompt)
        else:
            measure, wanted = decode, 1 / goals.tokens_per_second
            lifts = _fewer(plan, model, wanted)
        run = measure(model)
        limit = _binding(plan, run)
        lifts += _faster(plan, limit, wanted, measure)
        if limit.room:
            lifts.append(limit.room)
        if not lifts:
            lifts.append("a machine that is faster in every part: no single one is enough")
        raise CapacityError(
            f"the goal {verdict.goal} is out of reach on {plan.machine.name}:"
            f" {verdict.predicted:.4g} {verdict.unit} predicted; {limit.what} binds"
            f" ({run.phase}); what would lift it: {'; '.join(lifts)}"
        )


def _binding(plan: Plan, run: Run) -> _Limit:
    name = max(run.utilisation, key=lambda each: run.utilisation[each])
    share = f"{run.utilisation[name]:.0%} busy"
    machine = plan.machine
    if name.startswith(TRANSFERS):
        gpu = machine.gpus[int(name[3:])].rates
        assert gpu is not None
        return _Limit(
            f"the link to gpu{name[3:]} ({gpu.h2d.value / 1e9:.0f} GB/s, {share})",
            "a link to the GPUs {factor:.2f} times as fast",
            TRANSFERS,
            "another GPU to share the weights, or one with room for more of the experts",
        )
    if name == "link":
        return _Limit(
            f"the exchange between the GPUs ({share})",
            "a link between the GPUs {factor:.2f} times as fast",
            ("link",),
        )
    if name.startswith("gpu"):
        return _Limit(
            f"{name} ({machine.gpus[int(name[3:])].name}, {share})",
            "GPUs {factor:.2f} times as fast",
            ("memory", "bf16", "fp8", "attention"),
            "another GPU to share the prompt" if run.phase.startswith("prefill") else "",
        )
    read = machine.known_rates.read_all
    decode = run.phase.startswith("decode")
    return _Limit(
        f"host memory ({read / 1e9:.0f} GB/s, {share})"
        if decode
        else f"computation on the CPU ({share})",
        f"{'host memory' if decode else 'CPUs'} {{factor:.2f}} times as fast",
        ("read", "gemv", "dot"),
        "a GPU with room for more of the experts",
    )


def _shorter(plan: Plan, model: CostModel, wanted: float, prompt: int) -> list[str]:
    low, high = 0, prompt
    while high - low > 64:
        middle = (low + high) // 2
        if run_prefill(plan, model, middle).seconds <= wanted:
            low = middle
        else:
            high = middle
    return [f"a prompt of at most {low} tokens"] if low else []


def _fewer(plan: Plan, model: CostModel, wanted: float) -> list[str]:
    batch, context = plan.goals.concurrency, plan.goals.tokens_context

    def meets(context: int, batch: int) -> bool:
        return run_decode(plan, model, context, batch).seconds <= wanted

    fewer = (f"--concurrency {b}" for b in range(batch - 1, 0, -1) if meets(context, b))
    lengths = filter(None, (context // 2, context // 4, context // 16))
    shorter = (f"a context of {c} tokens" for c in lengths if meets(c, batch))
    return [found for found in (next(fewer, ""), next(shorter, "")) if found]


def _faster(
    plan: Plan, limit: _Limit, wanted: float, measure: Callable[[CostModel], Run]
) -> list[str]:
    """The least factor on the binding rate that meets the goal, if any does."""

    def meets(factor: float) -> bool:
        return measure(CostModel(plan, _with(plan.machine, limit.rates, factor))).seconds <= wanted

    if not meets(_FASTEST):
        return []
    low, high = 1.0, _FASTEST
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        if meets(middle):
            high = middle
        else:
            low = middle
    return [limit.lift.format(factor=high)]


def _with(machine: Machine, names: Sequence[str], factor: float) -> Machine:
    """The machine with these rates of its CPU and GPUs, `factor` times as much."""

    def times(value: Any) -> Any:
        return tuple(map(times, value)) if isinstance(value, tuple) else value.times(factor)

    def faster(rates: CpuRates | GpuRates | None) -> Any:
        mine = [name for name in names if name in type(rates).model_fields] if rates else []
        return rates and rates.model_copy(update={n: times(getattr(rates, n)) for n in mine})

    gpus = (gpu.model_copy(update={"rates": faster(gpu.rates)}) for gpu in machine.gpus)
    return machine.model_copy(update={"rates": faster(machine.rates), "gpus": tuple(gpus)})
