"""A request as the scheduler carries it: its answer so far, its clock, and how it ends; hides what
its listener is told.

Its methods run in the scheduler's thread, but for `Job.end`, which any may call.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hmc.errors import ExecutionError, HmcError
from hmc.runtime.batching.stats import Meter
from hmc.runtime.memory.kv import Sequence
from hmc.runtime.phases.beside import PromptJob
from hmc.runtime.tokens.generation import Answer, FinishReason
from hmc.runtime.tokens.requests import Request, Ticket, TokenLogprob, Update

_NOTHING = Update()


class Job:
    """A request on its way: its ticket, its answer so far and its clock."""

    def __init__(
        self,
        request: Request,
        ids: npt.NDArray[np.int32],
        ticket: Ticket,
        context: int,
        meter: Meter,
    ) -> None:
        self.request, self.ids, self.ticket = request, ids, ticket
        self.answer = Answer(request.text, ids, request.ends, context)
        self.sequence: Sequence | None = None
        self.past = 0
        """Tokens in the cache when `prompt`, who computes the prompt beside, began."""
        self.prompt: PromptJob | None = None
        self.attempts = 0
        self.phase = ""
        self.cached = 0
        self.scored: list[TokenLogprob] | None = [] if request.prompt_logprobs else None
        # The last token is sampled, not stored.
        self.most_tokens = min(len(ids) + max(request.ends.max_new_tokens - 1, 0), context)
        self._meter = meter

    @property
    def place(self) -> Sequence:
        """Where its tokens are, once it is admitted."""
        assert self.sequence is not None
        return self.sequence

    def tell(self, update: Update) -> None:
        """Give an update to the listener, whose error is raised."""
        if self.request.listener is not None and not self.ticket.done:
            self.request.listener(self._filled(update))

    def end(
        self, reason: FinishReason, error: HmcError | None = None, update: Update = _NOTHING
    ) -> None:
        """The last update, then those who wait are woken; from any thread, only the first call
        counts.
        """
        if not self.ticket.claim():
            return
        if self.request.listener is not None:
            last = replace(update, finish_reason=reason, error=error, timings=self.answer.timings)
            try:
                self.request.listener(self._filled(last))
            except Exception as fault:  # the caller's own code: anything may come
                reason, error = "error", error or as_error(self, "listener", fault)
        self._meter.ended(reason)
        self.ticket.settle(self.answer.generation(reason), error)

    def _filled(self, update: Update) -> Update:
        """With what the prompt gave."""
        scored, self.scored = self.scored, None
        known = None if scored is None else tuple(scored)
        return replace(update, prompt_logprobs=known, cached_tokens=self.cached)


def as_error(job: Job, part: str, fault: Exception) -> HmcError:
    """`fault` if it is one of ours, else an `ExecutionError` that names the request and `part`."""
    if isinstance(fault, HmcError):
        return fault
    error = ExecutionError(
        f"request {job.ticket.id}: its {part} raised {type(fault).__name__}: {fault}"
    )
    error.__cause__ = fault
    return error
