"""From a plan and a load to a prediction: runs the timelines of the phases that serve it
(hmc/plan/phases.py), and finds what binds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx

from hmc.errors import ContextLengthError, UsageError
from hmc.machine.model import Machine
from hmc.plan import Phase, Plan
from hmc.plan.phases import decode_calls, decode_phase, prefill_phase, prompt_stops
from hmc.predict.cost import Call, CostModel
from hmc.predict.timeline import Timeline, host_prefill, run

_LONGEST_PATHS = 12


@dataclass(frozen=True)
class Run:
    """One or several calls of a phase: `seconds` until the result, `busy` seconds of each resource,
    and the last call's critical path as (what, seconds), longest first."""

    phase: str
    calls: int
    seconds: float
    busy: Mapping[str, float]
    path: Sequence[tuple[str, float]]

    @property
    def utilisation(self) -> dict[str, float]:
        """Busy share of each resource."""
        if not self.seconds:
            return {}
        return {name: min(1.0, each / self.seconds) for name, each in sorted(self.busy.items())}


@dataclass(frozen=True)
class Verdict:
    """One goal, what is predicted for it, and whether that is good enough."""

    goal: str
    predicted: float
    unit: str
    met: bool


@dataclass(frozen=True)
class Prediction:
    """What a load does: one prompt of `prompt` tokens, then `batch` sequences decoding together at
    `context` tokens each. `too_large` names devices whose memory the plan exceeds."""

    prompt: int
    context: int
    batch: int
    prefill: Run
    decode: Run
    verdicts: tuple[Verdict, ...]
    too_large: tuple[str, ...]

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.prefill.seconds

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt / self.ttft

    @property
    def decode_rate(self) -> float:
        """Tokens a second of all sequences together."""
        return self.batch / self.decode.seconds

    def as_json(self) -> dict[str, object]:
        """The prediction as plain values; seconds and tokens a second."""
        return {
            "prompt": self.prompt,
            "context": self.context,
            "batch": self.batch,
            "ttft_s": self.ttft,
            # prompts that arrive at once, first come first served
            "ttft_last_s": self.ttft * self.batch,
            "too_large_for": list(self.too_large),
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
            "decode_tokens_per_second_each": self.decode_rate / self.batch,
            "tpot_s": self.decode.seconds,
            "slo": [vars(verdict) for verdict in self.verdicts],
            **{
                name: {
                    "phase": found.phase,
                    "calls": found.calls,
                    "seconds": found.seconds,
                    "utilisation": found.utilisation,
                    "critical_path": [
                        {"step": what, "seconds": seconds} for what, seconds in found.path
                    ],
                }
                for name, found in (("prefill", self.prefill), ("decode", self.decode))
            },
        }


def simulate(
    plan: Plan,
    *,
    machine: Machine | None = None,
    prompt: int = 512,
    context: int | None = None,
    batch: int = 1,
) -> Prediction:
    """Predict one load; `context` tokens of each decoding sequence default to the prompt's.

    Raises `UsageError` and `ContextLengthError` for a load the plan cannot take, `MachineError` for
    a machine without rates.
    """
    if prompt < 1 or batch < 1 or (context is not None and context < 0):
        raise UsageError("--prompt and --batch must be at least 1, --context not negative")
    before = prompt if context is None else context
    limits = plan.limits
    longest = max(prompt, before)
    if longest > limits.max_context:
        raise ContextLengthError(
            f"{longest} tokens exceed the plan's context of {limits.max_context}: compile with a"
            " larger --max-context"
        )
    if batch > limits.max_batch:
        raise UsageError(f"--batch {batch}: a decode step of the plan takes {limits.max_batch}")
    model = CostModel(plan, machine)
    return Prediction(
        prompt,
        before,
        batch,
        run_prefill(plan, model, prompt),
        run_decode(plan, model, before, batch),
        tuple(verdicts(plan, model)),
        tuple(plan.model_copy(update={"machine": model.machine}).too_large),
    )


def verdicts(plan: Plan, model: CostModel) -> Iterator[Verdict]:
    """Each of the plan's goals with its prediction; `UsageError` for one beyond its context."""
    goals = plan.goals
    if goals.ttft_seconds:
        goal = f"ttft {goals.ttft_seconds:g} s at {goals.ttft_prompt} tokens"
        _check_context(goal, goals.ttft_prompt, plan)
        seconds = run_prefill(plan, model, goals.ttft_prompt).seconds
        yield Verdict(goal, seconds, "s", seconds <= goals.ttft_seconds)
    if goals.tokens_per_second:
        many = "" if goals.concurrency == 1 else f" for each of {goals.concurrency}"
        goal = f"{goals.tokens_per_second:g} tokens/s at context {goals.tokens_context}{many}"
        _check_context(goal, goals.tokens_context, plan)
        rate = 1 / run_decode(plan, model, goals.tokens_context, goals.concurrency).seconds
        yield Verdict(goal, rate, "tokens/s", rate >= goals.tokens_per_second)


def _check_context(goal: str, tokens: int, plan: Plan) -> None:
    if tokens > plan.limits.max_context:
        raise UsageError(
            f"the goal {goal} is beyond the plan's context of {plan.limits.max_context} tokens:"
            " compile with a larger --max-context"
        )


def run_prefill(plan: Plan, model: CostModel, prompt: int, phase: str = "") -> Run:
    """A prompt through the phase of its length (or a named one), in as many calls as it takes."""
    found = plan.phase(phase or prefill_phase(plan, prompt))
    stops = prompt_stops(plan, found.name, prompt)
    calls = host_prefill(found, prompt, stops, plan.kv.aligned)
    return _run(found, len(calls), prefill_timelines(found, calls, model), model)


def prefill_timelines(
    phase: Phase, calls: Sequence[Call], model: CostModel
) -> list[tuple[float, Timeline]]:
    """Timelines of the calls of a prompt, and how many each stands for. All calls but the last
    differ in context alone, and time is linear in it: of many the first and the last but one stand
    for all but the last.
    """
    counts = [1.0] * len(calls)
    if len(calls) > 4:
        calls, counts = [calls[0], *calls[-2:]], [(len(calls) - 1) / 2] * 2 + [1.0]
    return [(count, run(phase, call, model)) for count, call in zip(counts, calls, strict=True)]


def prefill_extra(phase: Phase, model: CostModel) -> float:
    """Seconds that the machine adds to a prompt of this phase outside its layers."""
    rates = model.machine.rates
    if not phase.slots or rates is None or rates.prefill is None:
        return 0.0
    return rates.prefill.value


def run_decode(plan: Plan, model: CostModel, context: int, batch: int, phase: str = "") -> Run:
    """One token of each of `batch` sequences with `context` tokens before it, in as many calls as
    the phase takes.
    """
    found = plan.phase(phase or decode_phase(plan, batch))
    sizes = [last - first for first, last in decode_calls(found.max_tokens, batch)]
    timelines = [(1.0, run(found, Call(size, context, size), model)) for size in sizes]
    return _run(found, len(sizes), timelines, model)


def _run(
    phase: Phase, calls: int, timelines: Sequence[tuple[float, Timeline]], model: CostModel
) -> Run:
    busy: dict[str, float] = {}
    for count, timeline in timelines:
        for name, seconds in timeline.busy_till_result.items():
            busy[name] = busy.get(name, 0.0) + seconds * count
    total = sum(timeline.result * count for count, timeline in timelines)
    path = critical_path(timelines[-1][1])
    if extra := prefill_extra(phase, model):
        total += extra
        path.append(("start and hand-over", extra))
        path.sort(key=lambda item: -item[1])
    return Run(phase.name, calls, total, busy, path)


_THREAD = -1
"""In a graph of steps, the thread that hands them over."""


def longest_chain(timeline: Timeline) -> list[int]:
    """Positions of the steps of the longest chain up to the result, in which none can start before
    the one before it ends. The first starts when it is handed over.
    """
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    steps, end = timeline.phase.steps, len(timeline.phase.steps)
    last: dict[str, int] = {}
    signalled: dict[int, int] = {}
    for position, step in enumerate(steps):
        before = [signalled[event] for event in step.waits]
        before += [last[step.resource]] if step.resource in last else []
        last[step.resource] = position
        if step.signal >= 0:
            signalled[step.signal] = position
        if timeline.finish[position] <= timeline.result:  # and so did all that it waited for
            for each in before:
                graph.add_edge(each, position, weight=timeline.costs[each].seconds)
            graph.add_edge(_THREAD, position, weight=timeline.given[position])
            graph.add_edge(position, end, weight=timeline.costs[position].seconds)
    return list(networkx.dag_longest_path(graph))[1:-1]


def critical_path(timeline: Timeline) -> list[tuple[str, float]]:
    """The longest chain of steps up to the result, summed by resource, op and what binds it."""
    chain, sums = longest_chain(timeline), {}
    if chain and (given := timeline.given[chain[0]]):
        sums["handing over"] = given
    for position in chain:
        step, cost = timeline.phase.steps[position], timeline.costs[position]
        what = f"{step.resource} {step.op} ({cost.bound})"
        sums[what] = sums.get(what, 0.0) + cost.seconds
    found = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    return found[:_LONGEST_PATHS]
