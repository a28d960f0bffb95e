"""The requests being computed, and one step of them all: a chunk of a prompt, then a token for
every running sequence; hides places in the cache, sampling and what a fault ends.

Everything here runs in the thread that owns the executor, but for `Job.end`. A fault in what
belongs to one request (its sampler, mask, text or listener) ends that request alone; a fault of the
executor is raised by `Batch.step` and concerns all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmc.errors import CapacityError, ExecutionError, HmcError
from hmc.runtime.executor import Executor
from hmc.runtime.generation import Answer, FinishReason, Generation, Timings
from hmc.runtime.kv import Sequence
from hmc.runtime.logprobs import token_logprob
from hmc.runtime.requests import Request, Ticket, TokenLogprob, Update
from hmc.runtime.scheduler_policy import chunk_tokens, decode_phase, prefill_phase
from hmc.runtime.scheduler_stats import Clock, Meter

_NO_ROWS = np.zeros(0, np.int32)


class Job:
    """A request on its way: its ticket, its answer so far and its clock."""

    def __init__(
        self,
        request: Request,
        ids: npt.NDArray[np.int32],
        ticket: Ticket,
        context: int,
        meter: Meter,
        clock: Clock,
    ) -> None:
        self.request, self.ids, self.ticket = request, ids, ticket
        self.answer = Answer(request.text, ids, request.ends, context)
        self.sequence: Sequence | None = None
        self.phase = ""
        self.cached = 0
        self.scored: list[TokenLogprob] | None = [] if request.prompt_logprobs else None
        # The last token is sampled, not stored.
        self.most_tokens = min(len(ids) + max(request.ends.max_new_tokens - 1, 0), context)
        self._meter, self._clock = meter, clock
        self._began = clock()
        self._first = self._last = 0.0

    def stamp(self) -> None:
        """A token has been sampled now."""
        self._last = self._clock()
        self._first = self._first or self._last

    def tell(self, piece: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]) -> None:
        """Give an update to the listener, whose error is raised."""
        if self.request.listener is not None and not self.ticket.done:
            self.request.listener(self._update(piece, tokens, logprobs))

    def end(
        self,
        reason: FinishReason,
        error: HmcError | None = None,
        piece: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        """The last update, then those who wait are woken; from any thread, only the first call
        counts.
        """
        if not self.ticket.claim():
            return
        if self.request.listener is not None:
            try:
                self.request.listener(self._update(piece, tokens, logprobs, reason, error))
            except Exception as fault:  # the caller's own code: anything may come
                reason, error = "error", error or as_error(self, "listener", fault)
        answer = self.answer
        tokens = tuple(answer.tokens)
        self._meter.ended(reason)
        self.ticket.settle(Generation(answer.text, tokens, reason, self._timings()), error)

    def _update(
        self,
        piece: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None = None,
        error: HmcError | None = None,
    ) -> Update:
        scored, self.scored = self.scored, None
        return Update(
            piece=piece,
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=None if scored is None else tuple(scored),
            finish_reason=reason,
            error=error,
            cached_tokens=self.cached,
            timings=None if reason is None else self._timings(),
        )

    def _timings(self) -> Timings:
        ttft = self._first - self._began if self._first else 0.0
        total = self._last - self._began if self._last else 0.0
        return Timings(len(self.ids), len(self.answer.tokens), ttft, total)


class Batch:
    """`prefilling` is the request whose prompt is computed, one at a time, first come first served;
    `running` those that decode.
    """

    def __init__(self, executor: Executor, meter: Meter, *, prefix_cache: bool) -> None:
        self.prefilling: Job | None = None
        self.running: list[Job] = []
        self._executor, self._meter, self._reuse = executor, meter, prefix_cache
        self._full = False  # the cache was, and nothing has been released since

    @property
    def jobs(self) -> list[Job]:
        """All of them."""
        prefilling = self.prefilling
        return [*self.running, *([] if prefilling is None else [prefilling])]

    def admit(self, job: Job) -> bool:
        """Give the request a row and all the blocks it may come to need; False when it has to wait.

        Reserving the worst case means that a request that has begun is never short of room.
        """
        kv = self._executor.kv
        if self.prefilling is not None or not kv.rows_free or (self._full and self.running):
            return False
        sequence = self._executor.open()
        if self._reuse and not job.request.prompt_logprobs:
            job.cached = kv.adopt(sequence, job.ids)
        try:
            kv.reserve(sequence, job.most_tokens - sequence.length)
        except CapacityError:
            self._executor.release(sequence)
            job.cached, self._full = 0, True
            return False
        self._meter.reused(job.cached)
        job.sequence = sequence
        job.phase = prefill_phase(self._executor.plan, len(job.ids) - job.cached)
        self.prefilling = job
        return True

    def step(self) -> None:
        """End what has been cancelled, compute a chunk of a prompt, then decode. Raises what the
        executor raises.
        """
        for job in self.jobs:
            if job.ticket.cancelled:
                self._leave(job)
                job.end("cancelled")
        if self.prefilling is not None:
            self._prefill(self.prefilling)
        if self.running:
            self._decode()

    def fail(self, error: HmcError) -> None:
        """End everything with `error`."""
        for job in self.jobs:
            self._leave(job)
            job.end("error", error)

    def _prefill(self, job: Job) -> None:
        sequence = job.sequence
        assert sequence is not None
        plan, first = self._executor.plan, sequence.length
        count = chunk_tokens(plan, job.phase, len(job.ids) - first, len(self.running))
        last = first + count == len(job.ids)
        rows = np.arange(count, dtype=np.int32)
        if job.scored is None:
            rows = rows[-1:] if last else _NO_ROWS
        with self._meter.call(job.phase, prefilled=count):
            ids = job.ids[first : first + count]
            logits = self._executor.append(sequence, ids, rows, job.phase)
        if self._reuse:
            self._executor.kv.keep(sequence, job.ids)
        if job.scored is not None:
            top = job.request.logprobs or 0
            for row, token in zip(logits, job.ids[first + 1 :].tolist(), strict=False):
                job.scored.append(token_logprob(row, token, top))
        if not last:
            return
        self.running.append(job)
        self.prefilling = None
        if job.request.ends.max_new_tokens < 1:
            self._leave(job)
            job.end("length")
        else:
            self._advance(job, logits[-1])

    def _decode(self) -> None:
        jobs = list(self.running)
        sequences = [job.sequence for job in jobs if job.sequence is not None]
        tokens = np.array([job.answer.tokens[-1] for job in jobs], np.int32)
        phase = decode_phase(self._executor.plan, len(jobs))
        with self._meter.call(phase, decoded=len(jobs)):
            logits = self._executor.decode(sequences, tokens, phase)
        for job, row in zip(jobs, logits, strict=True):
            self._advance(job, row)

    def _advance(self, job: Job, logits: npt.NDArray[np.float32]) -> None:
        """Choose the next token of a request and tell it; it leaves at once if that ends it."""
        part = "mask"
        try:
            scores = _masked(job, logits)
            part = "sampling"
            token = job.request.sampler.sample(scores)
            job.stamp()
            self._meter.sampled()
            part = "text"
            piece = job.answer.push(token)
            wanted = job.request.logprobs
            logprobs = () if wanted is None else (token_logprob(logits, token, wanted),)
            part = "listener"
            reason = job.answer.reason
            if reason is None:
                job.tell(piece, (token,), logprobs)
                return
        except Exception as fault:  # the request's own code may raise anything
            self._leave(job)
            if part == "listener":
                job.request.listener = None
            job.end("error", as_error(job, part, fault))
            return
        self._leave(job)
        job.end(reason, None, piece, (token,), logprobs)

    def _leave(self, job: Job) -> None:
        """Free the request's place."""
        if job is self.prefilling:
            self.prefilling = None
        else:
            self.running.remove(job)
        if job.sequence is not None:
            self._executor.release(job.sequence)
            job.sequence = None
        self._full = False


def as_error(job: Job, part: str, fault: Exception) -> HmcError:
    """`fault` if it is one of ours, else an `ExecutionError` that names the request and `part`."""
    if isinstance(fault, HmcError):
        return fault
    error = ExecutionError(
        f"request {job.ticket.id}: its {part} raised {type(fault).__name__}: {fault}"
    )
    error.__cause__ = fault
    return error


def _masked(job: Job, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The logits with those of forbidden tokens at -inf."""
    if job.request.mask is None:
        return logits
    allowed = job.request.mask(list(job.answer.tokens))
    if allowed is None:
        return logits
    if allowed.shape != logits.shape or allowed.dtype != np.bool_:
        raise ExecutionError(
            f"request {job.ticket.id}: its mask is {allowed.dtype} {list(allowed.shape)}, not bool"
            f" {list(logits.shape)}"
        )
    if not allowed.any():
        raise ExecutionError(f"request {job.ticket.id}: its mask allows no token")
    return np.where(allowed, logits, np.float32(-np.inf))
