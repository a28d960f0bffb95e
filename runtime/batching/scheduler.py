"""Many requests over one executor: a bounded queue, one thread, continuous batching; hides the
thread, its locks, and how everything ends.

The thread's loop: end what was cancelled, admit what there is room for, compute one chunk of a
prompt, then one token for every running sequence (runtime/batching/batch.py). Who gets the chunk is
turns.py's, who gets room in the cache room.py's, phases and lengths of calls hmc/plan/phases.py's.
First come, first served: where the first in the queue finds no room, a few that need less may
begin before it, and then nobody. Long prompts are computed beside the loop where a prefill process
or the plan's phases for GPUs allow that, and join the running ones when they are done.

    scheduler = Scheduler(engine.executor)
    scheduler.start()
    ticket = scheduler.submit(Request(ids, sampler, ends, engine.text, listener=print))
    print(ticket.result().text)
    scheduler.close()
"""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from math import inf

from hmc.closing import Closing
from hmc.errors import CapacityError, ExecutionError, HmcError, QueueFullError, UsageError
from hmc.runtime.batching.batch import Batch
from hmc.runtime.batching.job import Job
from hmc.runtime.batching.room import no_room
from hmc.runtime.batching.stats import Meter, SchedulerStats
from hmc.runtime.batching.turns import age
from hmc.runtime.executor import Executor
from hmc.runtime.prefill.worker import PrefillWorker
from hmc.runtime.tokens.requests import Request, Ticket, token_ids

_CLOSE_SECONDS = 10.0
_TICK_SECONDS = 0.05
"""Between looks for requests whose time is over, while nothing else happens."""
_MOST_PASSED = 8
"""Requests that may begin before one that finds no room."""


class Scheduler(Closing):
    """Owns the executor's time from `start` to `close`: nobody else may use the executor meanwhile.

    All methods may be called from any thread. A context manager that starts and closes.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        max_queue: int = 64,
        request_seconds: float = 0.0,
        prefill: PrefillWorker | None = None,
    ) -> None:
        """At most `max_queue` requests wait, and each may take `request_seconds` in all (0: as long
        as it takes). `prefill`, over the executor's weights and cache,
        computes long prompts; from `start` to `close` it is the scheduler's, which replaces its
        process when that dies or hangs, and ends it when it hangs at `close`.
        """
        if max_queue < 1:
            raise UsageError(f"max_queue={max_queue}: must be at least 1")
        self._executor = executor
        self._max_queue = max_queue
        self._meter = Meter()
        self._batch = Batch(executor, self._meter, prefill, self._requeue)
        self._queue: list[Job] = []
        """By age: who made room for others is among the first."""
        self._held = 0
        self._seconds = request_seconds or inf
        self._changed = threading.Condition()
        self._numbers = count()
        self._draining = self._closing = False
        self._still = False  # nothing was computed in the latest step
        self._resting = True  # the thread has nothing to do, and has ended all it had
        self._failure: HmcError | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to work; requests submitted before have waited. A second start does nothing."""
        with self._changed:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="hmc-scheduler", daemon=True)
                self._thread.start()

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold `count` places in the queue for the length of a `with`, for requests that are being
        prepared and then submitted with `held`.

        Raises `QueueFullError` where there are none, `ExecutionError` as `submit` does.
        """
        with self._changed:
            self._check_open()
            self._check_places(count)
            self._held += count
        try:
            yield
        finally:
            with self._changed:
                self._held -= count

    def submit(self, request: Request, *, held: bool = False) -> Ticket:
        """Queue a request; `held`: the caller holds a place for it.

        Refuses at once: `UsageError` (empty prompt, token outside the vocabulary, bad argument),
        `ContextLengthError` (a prompt longer than the context), `CapacityError` (more than the
        whole cache holds), `QueueFullError`, `ExecutionError` (the scheduler drains, is closed or
        has failed).
        """
        limits = self._executor.plan.limits
        ids = token_ids(request.ids, self._executor.plan.model.vocab, limits.max_context)
        if request.logprobs is not None and request.logprobs < 0:
            raise UsageError(f"logprobs={request.logprobs}: must not be negative")
        if request.ends.max_new_tokens < 0:
            raise UsageError(f"max_new_tokens={request.ends.max_new_tokens}: must not be negative")
        ticket = Ticket(next(self._numbers), self._wake)
        job = Job(request, ids, ticket, limits.max_context, self._meter, self._seconds)
        capacity = self._executor.kv.capacity_tokens
        if job.most_tokens > capacity:
            raise CapacityError(
                f"the prompt's {len(ids)} tokens and up to {request.ends.max_new_tokens} new ones"
                f" exceed the {capacity} the KV cache holds: ask for fewer or compile the plan with"
                " a larger --max-context"
            )
        with self._changed:
            self._check_open()
            if not held:
                self._check_places(1)
            self._queue.append(job)
            self._changed.notify_all()
        return ticket

    def stats(self) -> SchedulerStats:
        """The figures now."""
        return self._meter.snapshot(
            self._executor.kv,
            running=len(self._batch.running),
            prefilling=len(self._batch.prompts) + len(self._batch.beside.jobs),
            waiting=len(self._queue),
            error=str(self._failure or ""),
            prefill=self._batch.beside.state,
        )

    @property
    def failure(self) -> HmcError | None:
        """Why the scheduler has stopped working; None while it is healthy."""
        return self._failure

    @property
    def stuck_for(self) -> float:
        """Seconds the step under way, or a prompt's call on the devices beside, has been running; 0
        without.
        """
        return max(self._meter.step_age, self._batch.beside.stuck_for)

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait up to `timeout` seconds for those accepted; whether all have
        ended.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(self._all_ended, timeout)

    def abandon(self, error: HmcError) -> None:
        """Give up: end every request with `error` now, without waiting for the step under way, and
        refuse new ones. For a watchdog; the listeners are called in the caller's thread.
        """
        with self._changed:
            self._failure = self._failure or error
            waiting = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for job in [*waiting, *self._batch.jobs]:
            job.end("error", error)

    def close(self, timeout: float = _CLOSE_SECONDS) -> bool:
        """Cancel everything and end the thread; whether it has ended. A step that does not come
        back within `timeout` seconds is left behind and goes on using the executor, its requests
        end with an error. A second call does nothing.
        """
        with self._changed:
            self._draining = self._closing = True
            for job in [*self._queue, *self._batch.jobs]:
                job.ticket.cancel()
            thread = self._thread
            self._changed.notify_all()
        if thread is threading.current_thread():
            return True  # a listener closes: the loop ends after this step
        if thread is None:
            self._drop_ended()
            return True
        thread.join(timeout)
        if thread.is_alive():
            self.abandon(
                ExecutionError(f"a step did not end within {timeout:g} s of closing the scheduler")
            )
        return not thread.is_alive()

    def __enter__(self) -> Scheduler:
        self.start()
        return self

    def _run(self) -> None:
        """The thread: step after step until it is closed or something fails."""
        try:
            while self._wait():
                with self._meter.step():
                    self._drop_ended()
                    self._admit()
                    self._still = not self._batch.step()
        except HmcError as fault:
            self.abandon(fault)
        except Exception as fault:  # whatever it is, nobody may be left waiting
            error = ExecutionError(f"the scheduler failed: {type(fault).__name__}: {fault}")
            error.__cause__ = fault
            self.abandon(error)
        if self._failure is not None:
            self._batch.fail(self._failure)
        else:
            self._batch.finish()

    def _wait(self) -> bool:
        """Sleep until there is work, or what is computed beside is to be looked after; False when
        there will be nothing to do.
        """
        with self._changed:
            while self._failure is None and not self._queue and not self._batch.jobs:
                self._resting, self._still = True, False
                self._changed.notify_all()
                if self._closing:
                    return False
                # Without patience nothing can happen but what notifies: a request, a close.
                if not self._changed.wait(self._batch.beside.patience):
                    break
            if self._still:
                self._changed.wait(self._batch.beside.patience or _TICK_SECONDS)
            self._resting = False
            return self._failure is None

    def _admit(self) -> None:
        """Let those in the queue begin for whom there is room."""
        with self._changed:
            waiting = list(self._queue)
        passed: Job | None = None
        for job in waiting:
            empty = self._batch.empty
            if self._batch.admit(job):
                self._unqueue(job)
                if passed is not None:
                    passed.passed += 1
            elif empty:
                self._unqueue(job)
                job.end("error", no_room(job))
            else:
                passed = passed or job
            if passed is not None and passed.passed >= _MOST_PASSED:
                return

    def _unqueue(self, job: Job) -> None:
        with self._changed:
            if job in self._queue:  # not after `abandon`, which has ended it
                self._queue.remove(job)

    def _requeue(self, job: Job) -> None:
        """Have a request wait again, before those that came after it."""
        with self._changed:
            insort(self._queue, job, key=age)
        if self._failure is not None:  # `abandon` may not have seen it
            job.end("error", self._failure)

    def _drop_ended(self) -> None:
        """End the requests that were cancelled, or whose time was over, while they waited."""
        with self._changed:
            dropped = [job for job in self._queue if job.ticket.cancelled or job.late]
            for job in dropped:
                self._queue.remove(job)
        for job in dropped:
            job.end_early()

    def _all_ended(self) -> bool:
        return self._failure is not None or (self._resting and not self._queue)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _check_places(self, count: int) -> None:
        """Raise `QueueFullError` where `count` more requests may not wait."""
        waiting = len(self._queue) + self._held
        if waiting + count > self._max_queue:
            raise QueueFullError(
                f"{waiting} requests wait already, of {self._max_queue} allowed: try again later"
            )

    def _check_open(self) -> None:
        if self._failure is not None:
            raise ExecutionError(f"the scheduler has stopped: {self._failure}")
        if self._draining:
            raise ExecutionError("the scheduler is closing: it takes no new requests")
