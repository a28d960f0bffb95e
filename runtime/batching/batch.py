"""The requests being computed, and one step of them all: a chunk of a prompt, then a token for
every running sequence; hides places in the cache, sampling and what a fault ends.

Everything here runs in the thread that owns the executor. A fault in what
belongs to one request (its sampler, mask, text or listener) ends that request alone; a fault of the
executor is raised by `Batch.step` and concerns all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmc.errors import CapacityError, ExecutionError, HmcError
from hmc.plan.phases import PREFILL, decode_phase, prefill_phase
from hmc.runtime.batching.job import Job, as_error
from hmc.runtime.batching.prefill import Arrival, PrefillsBeside
from hmc.runtime.batching.stats import Meter
from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import Sequence
from hmc.runtime.phases.beside import DevicePrefill
from hmc.runtime.prefill.worker import PrefillWorker
from hmc.runtime.tokens.requests import Update, token_logprob


class Batch:
    """`prefilling` is the request whose prompt is computed here, one at a time, first come first
    served; `running` those that decode; the prompts of others are computed beside, by a prefill
    process or, where the plan has a phase for that, on the devices: of prompts that stream one at a
    time.
    """

    def __init__(
        self,
        executor: Executor,
        meter: Meter,
        prefill: PrefillWorker | None,
    ) -> None:
        """With a process `prefill` the devices compute no prompt beside decoding."""
        self.prefilling: Job | None = None
        self.running: list[Job] = []
        self._executor, self._meter = executor, meter
        self._counts = meter.counts
        self.beside = PrefillsBeside(
            prefill or executor.beside, grown=executor.kv.keep, release=self._release
        )
        self._full = False  # the cache was, and nothing has been released since

    @property
    def jobs(self) -> list[Job]:
        """All of them."""
        prefilling = self.prefilling
        here = [] if prefilling is None else [prefilling]
        return [*self.running, *here, *self.beside.jobs]

    @property
    def empty(self) -> bool:
        """Whether nobody holds blocks of the cache, not even who computes a prompt that was
        cancelled.
        """
        return not self.jobs and self.beside.empty

    @property
    def waits(self) -> bool:
        """Whether there is nothing to do but what is done beside."""
        return not self.running and self.prefilling is None and not self.empty

    def admit(self, job: Job) -> bool:
        """Give the request a row and all the blocks it may come to need; False when it has to wait.

        Reserving the worst case means that a request that has begun is never short of room.
        """
        kv = self._executor.kv
        if self.prefilling is not None or not kv.rows_free or (self._full and not self.empty):
            return False
        taken = self.beside.exclusive
        if taken and job.phase not in ("", PREFILL):
            return False
        sequence = self._executor.open()
        if not job.request.prompt_logprobs:
            job.cached = kv.adopt(sequence, job.ids)
        try:
            kv.reserve(sequence, job.most_tokens - sequence.length)
        except CapacityError:
            self._release(sequence)
            job.cached, self._full = 0, True
            return False
        job.phase = prefill_phase(
            self._executor.plan,
            len(job.ids) - job.cached,
            every=job.scored is not None,
            decoding=len(self.running),
            beside=isinstance(self.beside.computer, DevicePrefill),
        )
        if taken and job.phase != PREFILL:
            self._release(sequence)
            job.cached = 0
            return False
        self._counts.prefix_hits += job.cached > 0
        self._counts.prefix_tokens += job.cached
        job.sequence = sequence
        if not self.beside.takes(job):
            self.prefilling = job
        return True

    def step(self) -> None:
        """End what has been cancelled, take what was done beside, compute a chunk of a prompt, then
        decode. Raises what the executor raises.
        """
        for job in self.jobs:
            if job.ticket.cancelled:
                self._leave(job)
                job.end("cancelled")
        self._take(self.beside.tend())
        if self.prefilling is not None:
            self._prefill(self.prefilling)
        if self.running:
            self._decode()

    def fail(self, error: HmcError) -> None:
        """End everything with `error`."""
        for job in self.jobs:
            self._leave(job)
            job.end("error", error)
        self.beside.finish()

    def _take(self, arrival: Arrival | None) -> None:
        if arrival is None:
            return
        job, logits, error = arrival
        self.running.append(job)
        if logits is not None:
            self._counts.prompt_tokens += len(job.ids) - job.cached
            self._begin(job, logits)
        else:
            self._leave(job)
            job.end("error", error)

    def _prefill(self, job: Job) -> None:
        sequence, first = job.place, job.place.length
        with self._meter.call(job.phase):
            logits = self._executor.chunk(
                sequence,
                job.ids[first:],
                job.phase,
                every=job.scored is not None,
                decoding=len(self.running),
            )
        self._meter.did(prefilled=sequence.length - first)
        self._executor.kv.keep(sequence, job.ids)
        if job.scored is not None:
            top = job.request.logprobs or 0
            for row, token in zip(logits, job.ids[first + 1 :].tolist(), strict=False):
                job.scored.append(token_logprob(row, token, top))
        if sequence.length < len(job.ids):
            return
        self.running.append(job)
        self.prefilling = None
        self._begin(job, logits[-1])

    def _begin(self, job: Job, logits: npt.NDArray[np.float32]) -> None:
        """The prompt of a running request is in the cache."""
        if job.request.ends.max_new_tokens < 1:
            self._leave(job)
            job.end("length")
        else:
            self._advance(job, logits)

    def _decode(self) -> None:
        jobs = list(self.running)
        sequences = [job.place for job in jobs]
        tokens = np.array([job.answer.tokens[-1] for job in jobs], np.int32)
        phase = decode_phase(self._executor.plan, len(jobs))
        with self._meter.call(phase):
            logits = self._executor.decode(sequences, tokens, phase)
        self._meter.did(decoded=len(jobs))
        for job, row in zip(jobs, logits, strict=True):
            self._advance(job, row)

    def _advance(self, job: Job, logits: npt.NDArray[np.float32]) -> None:
        """Choose the next token of a request and tell it; it leaves at once if that ends it."""
        part = "mask"
        try:
            scores = _masked(job, logits)
            part = "sampling"
            token = job.request.sampler.sample(scores)
            self._counts.tokens_generated += 1
            part = "text"
            piece = job.answer.push(token)
            wanted = job.request.logprobs
            logprobs = () if wanted is None else (token_logprob(logits, token, wanted),)
            update = Update(piece, (token,), logprobs)
            part = "listener"
            reason = job.answer.reason
            if reason is None:
                job.tell(update)
                return
        except Exception as fault:  # the request's own code may raise anything
            self._leave(job)
            if part == "listener":
                job.request.listener = None
            job.end("error", as_error(job, part, fault))
            return
        self._leave(job)
        job.end(reason, None, update)

    def _leave(self, job: Job) -> None:
        """Free the request's place."""
        if job in self.beside.jobs:
            self.beside.drop(job)  # and releases when nobody writes to it
            return
        if job is self.prefilling:
            self.prefilling = None
        else:
            self.running.remove(job)
        self._release(job.place)

    def _release(self, sequence: Sequence) -> None:
        self._executor.release(sequence)
        self._full = False


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
