"""Predicts one prompt that streams through the last GPU while a batch decodes on the first: what
each costs the other.

Both phases' steps run over their resources as ever, with these changes of what a step takes:

* on a resource of both, decode goes first: a prefill step gets the share of it that decode leaves,
  s / (1 - u) with u the busy share of a decode step
* a decode step there waits for what the prefill has running: on a GPU for its running thread blocks
  (`preempt`; the whole kernel where that is unknown), on a way of copies for the share that the
  prefill takes
* the slowest decode step waits, for each of its copies on a way of both, for one whole piece of the
  prefill's (at most `COPY_PIECE` bytes: the runtime cuts longer loads), but for no more in all than
  the prefill has there within two steps
* the CPU's decode reads memory at its gemv rate while weights leave memory for the GPU: where both
  together exceed what memory gives, both slow down alike
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hmc.errors import ContextLengthError, UsageError
from hmc.machine.model import Machine
from hmc.plan import Phase, Plan, Step
from hmc.plan.phases import BESIDE, decode_phase
from hmc.predict.cost import COPY_PIECE, TRANSFERS, Call, Cost, CostModel, gemv_rate
from hmc.predict.run import prefill_extra
from hmc.predict.timeline import run, scheduled


@dataclass(frozen=True)
class Beside:
    """A prompt of `prompt` tokens streamed while `batch` sequences decode at `context` tokens:
    seconds to the first token and seconds a token of each sequence, alone and together;
    `tpot_worst` is the slowest decode step meanwhile."""

    prompt: int
    context: int
    batch: int
    ttft_alone: float
    ttft: float
    tpot_alone: float
    tpot: float
    tpot_worst: float

    def as_json(self) -> dict[str, float]:
        """Plain values, with both ratios."""
        return {
            **vars(self),
            "ttft_ratio": self.ttft / self.ttft_alone,
            "tpot_ratio": self.tpot / self.tpot_alone,
            "tpot_worst_ratio": self.tpot_worst / self.tpot_alone,
        }


def beside(
    plan: Plan,
    *,
    machine: Machine | None = None,
    prompt: int,
    context: int,
    batch: int,
) -> Beside:
    """Predict the load; `UsageError` for a plan whose machine has no second GPU to stream through,
    `ContextLengthError` for a prompt beyond what one call takes.
    """
    found = next((each for each in plan.phases if each.name == BESIDE), None)
    if found is None:
        raise UsageError(
            "--beside needs a plan for at least two GPUs with experts on the host: with one, a"
            " prompt and the decoding take turns"
        )
    if not 0 < prompt <= found.max_tokens:
        raise ContextLengthError(
            f"{prompt} tokens exceed the {found.max_tokens} that one call of {BESIDE} takes"
        )
    if not 0 < batch <= plan.limits.max_batch:
        raise UsageError(
            f"--batch {batch}: a decode step of the plan takes {plan.limits.max_batch}"
        )
    model = CostModel(plan, machine)
    decode = plan.phase(decode_phase(plan, batch))
    first = _Side(found, Call(prompt), model)
    second = _Side(decode, Call(batch, context, batch), model)
    slower = _memory_factor(model, plan)
    extra = prefill_extra(found, model)
    ttft = first.seconds_with(lambda step, cost: _yielding(step, cost, second, slower))
    tpot = second.seconds_with(lambda step, cost: _urgent(step, cost, first, slower, model))
    return Beside(
        prompt,
        context,
        batch,
        first.seconds + extra,
        ttft + extra,
        second.seconds,
        tpot,
        tpot + _latest(first, second),
    )


class _Side:
    """One phase's call alone: its seconds, the busy share of each resource, its longest piece (a
    kernel, or a copy of `COPY_PIECE`) there, and how many it has."""

    def __init__(self, phase: Phase, call: Call, model: CostModel) -> None:
        self.phase = phase
        timeline = run(phase, call, model)
        self._costs = timeline.costs
        self.seconds = timeline.result
        busy = timeline.busy_till_result
        self.share = {name: each / self.seconds for name, each in busy.items()}
        self.longest: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self._spans: dict[str, list[tuple[float, float]]] = {}
        spans = zip(timeline.start, timeline.finish, strict=True)
        for step, cost, span in zip(phase.steps, self._costs, spans, strict=True):
            name = step.resource
            pieces = max(1, cost.launches)
            if name.startswith(TRANSFERS):
                pieces = -(-int(cost.bytes.get("pcie", 0)) // COPY_PIECE) or 1
            self.longest[name] = max(cost.seconds / pieces, self.longest.get(name, 0.0))
            self.steps[name] = self.steps.get(name, 0) + 1
            self._spans.setdefault(name, []).append(span)

    def busiest(self, resource: str, window: float) -> float:
        """The most seconds that a resource is busy in any stretch of `window` seconds."""
        most = total = 0.0
        first, spans = 0, self._spans[resource]
        for start, end in spans:
            total += end - start
            while spans[first][1] < end - window:
                total -= spans[first][1] - spans[first][0]
                first += 1
            most = max(most, total)
        return most

    def seconds_with(self, change: Callable[[Step, Cost], float]) -> float:
        """Seconds when every step takes what `change` makes of its cost."""
        steps = zip(self.phase.steps, self._costs, strict=True)
        changed = [Cost(change(step, cost), cost.bound) for step, cost in steps]
        return scheduled(self.phase, changed).result


def _yielding(step: Step, cost: Cost, other: _Side, slower: float) -> float:
    """What a prefill step takes beside decode."""
    seconds = cost.seconds * (slower if step.op == "load" else 1.0)
    return seconds / (1 - other.share.get(step.resource, 0.0))


def _urgent(step: Step, cost: Cost, other: _Side, slower: float, model: CostModel) -> float:
    """What a decode step takes beside the prefill."""
    if step.resource == "cpu":
        return cost.seconds * slower
    if step.resource not in other.share:
        return cost.seconds
    if step.resource.startswith(TRANSFERS):
        return cost.seconds / (1 - other.share[step.resource])
    rates = model.machine.gpus[int(step.resource[3:])].rates
    known = rates.preempt if rates is not None else None
    return cost.seconds + cost.launches * (
        other.longest[step.resource] if known is None else known.value
    )


def _latest(prefill: _Side, decode: _Side) -> float:
    """Seconds that the slowest decode step waits for copies of the prefill."""
    shared = [name for name in decode.steps if name.startswith(TRANSFERS) and name in prefill.steps]
    return sum(
        min(
            decode.steps[name] * prefill.longest[name],
            prefill.busiest(name, 2 * decode.seconds),
        )
        for name in shared
    )


def _memory_factor(model: CostModel, plan: Plan) -> float:
    """How much slower reads of host memory get when decode and a stream want it at once."""
    rates, gpu = model.machine.known_rates, model.machine.gpus[-1].rates
    assert gpu is not None
    forms = {experts.format for experts in plan.experts}
    wanted = max(gemv_rate(rates, form, 1) for form in forms) + gpu.h2d.value
    return max(1.0, wanted / rates.read_all)
