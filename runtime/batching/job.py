"""A request as the scheduler carries it: its answer so far, its clock, and how it ends; hides what
its listener is told.

Its methods run in the scheduler's thread, but for `Job.end`, which any may call.
"""

from __future__ import annotations

import time
from dataclasses import replace
from math import inf

import numpy as np
import numpy.typing as npt

from hmc.errors import ExecutionError, HmcError, RequestTimeoutError
from hmc.runtime.batching.stats import Meter
from hmc.runtime.memory.kv import Sequence
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
        seconds: float = inf,
    ) -> None:
        """It may take `seconds` from now on."""
        self.request, self.ids, self.ticket = request, ids, ticket
        self.answer = Answer(request.text, ids, request.ends, context)
        self.sequence: Sequence | None = None
        self.phase = ""
        """That computes its prompt, from when that has begun."""
        self.tried = -1
        """How much had been released when it last found no room."""
        self.passed = 0
        """Requests behind it that began while it found no room."""
        self.begun = False
        self.shared = self.cached = 0
        """Tokens found in the cache: this time, and when it first began."""
        self.scored: list[TokenLogprob] | None = [] if request.prompt_logprobs else None
        # The last token is sampled, not stored.
        self.most_tokens = min(len(ids) + max(request.ends.max_new_tokens - 1, 0), context)
        self._seconds, self._due = seconds, time.monotonic() + seconds
        self._meter = meter

    @property
    def place(self) -> Sequence:
        """Where its tokens are, once it is admitted."""
        assert self.sequence is not None
        return self.sequence

    @property
    def known(self) -> npt.NDArray[np.int32]:
        """The prompt and what has been answered so far, i32 [tokens]."""
        return np.concatenate([self.ids, np.array(self.answer.tokens, np.int32)])

    @property
    def left(self) -> int:
        """Tokens of its prompt that are not in the cache; nothing counts before it is admitted."""
        return len(self.ids) - self.place.length

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self._due

    @property
    def pending(self) -> int:
        """The token that the next decode step stores, of a request whose prompt is in the cache."""
        return self.answer.tokens[self.place.length - len(self.ids)]

    @property
    def current(self) -> bool:
        """Whether all that is known is in the cache, so that the next token can be chosen; not so
        after a preemption, as long as answered tokens are stored again.
        """
        return self.place.length == len(self.ids) + len(self.answer.tokens)

    @property
    def best(self) -> int:
        """How many of the largest logits the next token is among; 0: any, or all logits are
        wanted."""
        asked = self.request
        return 0 if asked.mask is not None or asked.logprobs is not None else asked.sampler.best

    def paused(self) -> None:
        """It has made room: nothing of it is in the cache any more."""
        self.sequence, self.phase = None, ""
        if self.scored is not None:
            self.scored = []

    def end_early(self) -> None:
        """End it because somebody has cancelled it, or because its time is over."""
        if self.ticket.cancelled:
            self.end("cancelled")
        else:
            self.end("error", self._late())

    def _late(self) -> HmcError:
        said = len(self.answer.tokens)
        return RequestTimeoutError(
            f"the request took longer than the {self._seconds:g} s that this server gives one; it"
            f" had {said} token{'s' * (said != 1)} of its answer: ask for fewer"
        )

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
        if scored is None and update.cached_tokens == self.cached:
            return update
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
