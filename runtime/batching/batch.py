"""The requests being computed, and one step of them all: a chunk of a prompt, then a token for
every running sequence; hides sampling, who makes room for whom, and what a fault ends.

Everything here runs in the thread that owns the executor. A fault in what
belongs to one request (its sampler, mask, text or listener) ends that request alone; a fault of the
executor is raised by `Batch.step` and concerns all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError
from hmc.plan.phases import PREFILL, decode_phase, prefill_phase
from hmc.runtime.batching.job import Job, as_error
from hmc.runtime.batching.masks import Masks
from hmc.runtime.batching.prefill import Arrival, PrefillsBeside
from hmc.runtime.batching.room import Room, no_room, youngest
from hmc.runtime.batching.stats import Meter
from hmc.runtime.batching.turns import Turns, age
from hmc.runtime.executor import Executor
from hmc.runtime.phases.beside import DevicePrefill
from hmc.runtime.prefill.worker import PrefillWorker
from hmc.runtime.tokens.requests import Update, token_logprob


class Batch:
    """`prompts` are the requests whose prompts are computed here, chunk by chunk in turns, or wait
    for who computes them beside: a prefill process or, where the plan has a phase for that, the
    devices. `running` are those that decode.
    """

    def __init__(
        self,
        executor: Executor,
        meter: Meter,
        prefill: PrefillWorker | None,
        requeue: Callable[[Job], None],
    ) -> None:
        """With a process `prefill` the devices compute no prompt beside decoding. `requeue` has a
        request that made room wait; it is called before the request leaves.
        """
        self.prompts: list[Job] = []
        self.running: list[Job] = []
        self._executor, self._meter, self._requeue = executor, meter, requeue
        self._counts = meter.counts
        self._room, self._turns, self._masks = Room(executor), Turns(), Masks()
        self.beside = PrefillsBeside(prefill or executor.beside, executor.kv, self._room)

    @property
    def jobs(self) -> list[Job]:
        """All of them."""
        return [*self.running, *self.prompts, *self.beside.jobs]

    @property
    def empty(self) -> bool:
        """Whether nobody holds blocks of the cache, not even who computes a prompt that was
        cancelled.
        """
        return not self.jobs and self.beside.empty

    def admit(self, job: Job) -> bool:
        """Let a request begin, or go on after it made room; False when it has to wait."""
        if not self._room.enter(job, len(self.jobs)):
            return False
        (self.prompts if job.left > 0 else self.running).append(job)
        return True

    def step(self) -> bool:
        """End what has been cancelled or is late, take what was done beside, compute a chunk of a
        prompt, then decode; whether anything was computed. Raises what the executor raises.
        """
        for job in self.jobs:
            if job.ticket.cancelled or job.late:
                self._leave(job)
                job.end_early()
        self._take(self.beside.tend())
        prompt = self._next_prompt()
        if prompt is not None:
            self._prefill(prompt)
        decoding = self._with_room()
        if decoding:
            self._decode(decoding)
        return prompt is not None or bool(decoding)

    def fail(self, error: HmcError) -> None:
        """End everything with `error`."""
        for job in self.jobs:
            self._leave(job)
            job.end("error", error)
        self.finish()

    def finish(self) -> None:
        """Nothing follows: wait until nobody's blocks are written to."""
        self._masks.close()
        self.beside.finish()

    def _take(self, arrival: Arrival | None) -> None:
        if arrival is None:
            return
        job, logits, error = arrival
        self.running.append(job)
        if logits is not None:
            self._counts.prompt_tokens += len(job.ids) - job.shared
            self._begin(job, logits)
        else:
            self._leave(job)
            job.end("error", error)

    def _next_prompt(self) -> Job | None:
        """Whose chunk is computed now, if anybody's is; what is computed beside is begun."""
        waiting = [job for job in self.prompts if self._may_go_on(job)]
        for job in self._turns.order(waiting):
            if not job.phase:
                self._room.begin(job)
                if job.left <= 0:  # of one that made room all has been found
                    self.running.append(job)
                    self.prompts.remove(job)
                    continue
                if not self._may_go_on(job):  # so little is left that others compute it
                    continue
                self._begun(job)
                job.phase = self._phase(job)
                if self.beside.takes(job, job.phase):
                    self.beside.start(job)
                    self.prompts.remove(job)
                    continue
            self._turns.took(job, waiting)
            return job
        return None

    def _may_go_on(self, job: Job) -> bool:
        """Whether a chunk of a prompt can be computed now, or the whole of it begun beside. Phases
        that stream share memory: one at a time.
        """
        beside, phase = self.beside, job.phase or self._phase(job)
        if not job.phase and beside.takes(job, phase):
            streams = any(other.phase not in ("", PREFILL) for other in self.prompts)
            alone = beside.computer is not None and beside.computer.exclusive
            return beside.empty and not (alone and streams)
        return phase == PREFILL or not beside.exclusive

    def _phase(self, job: Job) -> str:
        return prefill_phase(
            self._executor.plan,
            job.left,
            every=job.scored is not None,
            decoding=len(self.running),
            beside=isinstance(self.beside.computer, DevicePrefill),
        )

    def _begun(self, job: Job) -> None:
        if not job.begun:
            job.begun, job.cached = True, job.shared
            self._counts.prefix_hits += job.cached > 0
            self._counts.prefix_tokens += job.cached

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
        if job.left:
            if sequence.stops:  # after the last of them little is left
                job.phase = self._phase(job)
            return
        self.running.append(job)
        self.prompts.remove(job)
        self._begin(job, logits[-1])

    def _begin(self, job: Job, logits: npt.NDArray[np.float32]) -> None:
        """The prompt of a running request is in the cache."""
        if job.request.ends.max_new_tokens < 1:
            self._leave(job)
            job.end("length")
        elif job.current:  # else it goes on after it made room
            self._advance(job, logits)

    def _with_room(self) -> list[Job]:
        """The running requests that have room for their next token, for which those that came last
        make room. One has none for now where a dropped prompt's blocks are still written to.
        """
        decoding = []
        for job in sorted(self.running, key=age):
            while job in self.running and not self._room.has_next(job):
                if self.beside.leaving:
                    break
                jobs = self.jobs
                if len(jobs) == 1:
                    self._leave(job)
                    job.end("error", no_room(job))
                else:
                    self._preempt(youngest(jobs))
            else:
                decoding += [job] if job in self.running else []
        return decoding

    def _preempt(self, job: Job) -> None:
        """Have a request make room. It waits at its place in the queue and goes on with the same
        sampler and mask, as if nothing had been: its prompt is found or computed again, and its
        answer stored again by the same kernels.
        """
        self._counts.preemptions += 1
        self._requeue(job)
        if job in self.beside.jobs:
            self.beside.drop()
            job.paused()
            return
        (self.running if job in self.running else self.prompts).remove(job)
        self._room.keep(job)
        self._room.release(job.place)
        job.paused()

    def _decode(self, jobs: list[Job]) -> None:
        sequences = [job.place for job in jobs]
        tokens = np.array([job.pending for job in jobs], np.int32)
        phase = decode_phase(self._executor.plan, len(jobs))
        self._masks.ahead(jobs)
        with self._meter.call(phase):
            best = [job.best for job in jobs]
            logits = self._executor.decode(sequences, tokens, phase, best)
        self._meter.did(decoded=len(jobs))
        for job, row in zip(jobs, logits, strict=True):
            if job.current:
                self._advance(job, row)
            else:
                self._counts.tokens_restored += 1

    def _advance(self, job: Job, logits: npt.NDArray[np.float32]) -> None:
        """Choose the next token of a request and tell it; it leaves at once if that ends it."""
        part = "mask"
        try:
            scores = self._masks.applied(job, logits)
            part = "sampling"
            token = job.request.sampler.sample(scores)
            self._counts.tokens_generated += 1
            part = "text"
            piece = job.answer.push(token)
            wanted = job.request.logprobs
            logprobs = () if wanted is None else (token_logprob(logits, token, wanted),)
            update = Update(piece, (token,), logprobs, cached_tokens=job.cached)
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
            self.beside.drop()  # and releases when nobody writes to it
            return
        (self.running if job in self.running else self.prompts).remove(job)
        self._room.release(job.place)
