"""From which prompt length on which prefill phase is the fastest, out of the cost model.

Seconds of `prefill.host` grow with every token; those of a streamed phase hardly do until
computation outlasts the link. So each pair of curves crosses once.
"""

from __future__ import annotations

from collections.abc import Iterable

from hmc.plan import Phase, Plan
from hmc.plan.phases import PREFILL
from hmc.predict.cost import Call, CostModel
from hmc.predict.timeline import PhaseTimer, host_prefill

STEP = 64
"""Prompt lengths are looked at in steps of so many tokens."""


class PrefillTimes:
    """Seconds of a prompt in each phase of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._model = CostModel(plan)
        self._timers: dict[int, tuple[Phase, PhaseTimer]] = {}
        self._host = host = plan.phase(PREFILL)
        rates = plan.machine.rates
        self._extra = 0.0 if rates is None or rates.prefill is None else rates.prefill.value
        # a chunk's time grows linearly with the context before it: two points tell the rest
        self._far = max(plan.limits.max_context, 2 * host.max_tokens)
        self._low, self._high = (
            self._call(host, Call(host.max_tokens, at)) for at in (0, self._far)
        )

    def host(self, tokens: int) -> float:
        """In `prefill.host`: one call as it is; several by the share that each is of a whole one,
        which leaves out that short ones read the same weights."""
        host = self._host
        if tokens <= host.max_tokens:
            return self._call(host, Call(tokens))
        return sum(
            (self._low + (self._high - self._low) * call.context / self._far)
            * call.tokens
            / host.max_tokens
            for call in host_prefill(host, tokens)
        )

    def streamed(self, phase: Phase, tokens: int) -> float:
        """In one call of a streamed phase, with what the machine adds to every one."""
        return self._call(phase, Call(tokens)) + self._extra

    def stalled(self, phase: Phase, lengths: Iterable[int], factor: float) -> dict[int, float]:
        """Seconds of those prompts of `lengths` that take `factor` times what the busiest resource
        is busy: something waits there that need not."""
        found = {}
        for tokens in lengths:
            if tokens <= phase.max_tokens:
                timeline = self._timer(phase).run(Call(tokens))
                if timeline.result > factor * max(timeline.busy.values()):
                    found[tokens] = timeline.result + self._extra
        return found

    def link_seconds(self, phase: Phase) -> float:
        """What the busiest way to a GPU takes to load everything once."""
        timeline = self._timer(phase).run(Call(STEP))
        return max(busy for name, busy in timeline.busy.items() if name.startswith("h2d"))

    def crossing(self, phase: Phase, step: int = STEP) -> int:
        """The least multiple of `step` tokens from which on a streamed phase is faster than
        `prefill.host`; 0: no prompt that it takes.

        From below: what the phase takes at a length is what it takes at least at the crossing, so
        the length at which the host takes as long is no longer than the crossing.
        """
        tokens, most = step, phase.max_tokens // step * step
        while True:
            seconds = self.streamed(phase, tokens)
            if self.host(most) <= seconds:
                return 0
            low, high = 0, most // step
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self.host(middle * step) > seconds else (middle, high)
            if high * step <= tokens:
                return tokens
            tokens = high * step

    def overtaken(self, slower: Phase, faster: Phase, first: int, step: int) -> int:
        """The least number of tokens, `first` or some steps more, at which the second phase takes
        no longer than the first; at the latest what the first one takes."""
        low, high = -1, max(0, (slower.max_tokens - first) // step)
        while high - low > 1:
            middle = (low + high) // 2
            tokens = first + middle * step
            done = self.streamed(faster, tokens) <= self.streamed(slower, tokens)
            low, high = (low, middle) if done else (middle, high)
        return first + high * step

    def _call(self, phase: Phase, call: Call) -> float:
        return self._timer(phase).run(call).result

    def _timer(self, phase: Phase) -> PhaseTimer:
        if id(phase) not in self._timers:
            self._timers[id(phase)] = phase, PhaseTimer(phase, self._model)
        return self._timers[id(phase)][1]
