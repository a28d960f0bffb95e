"""Threads that work through queues, with generation-counted events between them.

One lock guards everything; each worker sleeps on a condition of its own, so that nothing wakes but
what can go on. Used by the host backend for every stream and by the CUDA backend for "cpu".
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import count
from random import Random

from hmc.errors import ExecutionError, HmcError, WorkerError
from hmc.runtime.devices.base import Clock, Work, in_order
from hmc.runtime.devices.flags import Flags

_SPINS, _NAP_SECONDS = 20, 20e-6
"""A worker looks at a flag so often before it naps between two looks."""
_JOIN_SECONDS = 2.0
"""How long `close` waits for a worker that is still in the middle of its last piece of work."""


class HostEvent:
    """`made` counts the records appended to queues so far, `seen` the latest one that happened."""

    def __init__(self) -> None:
        self.made = 0
        self.seen = 0
        self.waiting: list[threading.Condition] = []


class HostSpan:
    """Start and end, as `time.perf_counter` tells them."""

    def __init__(self) -> None:
        self.start = 0.0
        self.end = 0.0

    def seconds(self, clock: Clock) -> tuple[float, float]:
        """See `base.Span`."""
        return self.start - clock, self.end - clock


class Board:
    """What the workers of one backend share: the lock, the first error, whether to go on."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds after which a backend on which nothing ends is given up."""
        self.lock = threading.Lock()
        self.idle = threading.Condition(self.lock)
        self.timeout = timeout
        self.workers: dict[str, Worker] = {}
        self.flags: list[Flags] = []
        self.error: BaseException | None = None
        self.stopped = False

    def fail(self, error: BaseException) -> None:
        """Note the first error and stop everybody; the lock is held."""
        if self.error is None:
            self.error = error
        self._stop()

    def drain(self, workers: Collection[Worker]) -> None:
        """Wait until what was appended to `workers` so far is done; raises the first error of any
        worker, or `WorkerError` where nothing of that ended for `timeout` seconds."""
        with self.lock:
            goals = [(worker, worker.appended) for worker in workers]
            for worker, goal in goals:
                worker.goals.append(goal)
            try:
                self._wait(lambda: [worker for worker, goal in goals if worker.done < goal])
            finally:
                for worker, goal in goals:
                    worker.goals.remove(goal)

    def happen(self, event: HostEvent) -> None:
        """Wait until the latest record of an event made so far has happened; raises as `drain`."""
        made = event.made
        with self.lock:
            event.waiting.append(self.idle)
            try:
                self._wait(lambda: () if event.seen >= made else self.workers.values())
            finally:
                event.waiting.remove(self.idle)

    def check(self) -> None:
        """Raise what stopped the board, if it is stopped."""
        if self.error is not None:
            raise self.error
        if self.stopped:
            raise ExecutionError("the devices were closed: open them again")

    def _wait(self, pending: Callable[[], Collection[Worker]]) -> None:
        """Wait until no worker is pending; the lock is held. A worker's progress counts for as long
        as it is waited for: others may go on for ever."""
        began = time.perf_counter()
        while not self.stopped and (left := pending()):
            latest = max(began, *(worker.progress for worker in left))
            seconds = latest + self.timeout - time.perf_counter()
            if seconds > 0:
                self.idle.wait(seconds)
            else:
                self.fail(WorkerError(self._stuck(left)))
        if self.error is not None or pending():
            self.check()

    def _stuck(self, pending: Collection[Worker]) -> str:
        doing = [f"{worker.name} {worker.doing}" for worker in pending if worker.doing]
        return (
            f"nothing ended for {self.timeout:g} s: {'; '.join(doing)}. The devices were closed;"
            " a lower load or a longer timeout may help"
        )

    def close(self, error: BaseException | None = None) -> None:
        """Stop every worker and join its thread, but one that is stuck; `error` is why."""
        with self.lock:
            if isinstance(error, Exception):
                self.error = self.error or error
            self._stop()
        until = time.monotonic() + min(_JOIN_SECONDS, self.timeout)
        for worker in self.workers.values():
            worker.join(max(0.0, until - time.monotonic()))

    def _stop(self) -> None:
        """Let nobody wait or begin any longer; the lock is held."""
        self.stopped = True
        for flags in self.flags:
            flags.abort()
        for worker in self.workers.values():
            worker.wake.notify_all()
        self.idle.notify_all()


class Worker:
    """A stream run by one thread, which starts with the first piece of work."""

    def __init__(self, name: str, board: Board, delays: int | None = None) -> None:
        """With `delays`, a seed, every piece of work starts after a pseudo-random time, the same
        for the same seed, stream and number of the piece."""
        self.name = name
        self.doing = ""
        self._board = board
        self._delays = delays
        self._numbers = count()
        self.appended = 0
        self.done = 0
        self.goals: list[int] = []  # counts of `done` that somebody waits for
        self.progress = 0.0  # when the latest task ended
        self._queue: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self.wake = threading.Condition(board.lock)
        board.workers[name] = self

    def append(self, task: Callable[[], None]) -> None:
        """Append a task; raises the error that stopped the board."""
        board = self._board
        with board.lock:
            board.check()
            self._queue.append(task)
            self.appended += 1
            if self._thread is None:
                name = f"hmc-{self.name}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            self.wake.notify_all()

    def launch(
        self, work: Work, label: str, seconds: float = 0.0, span: HostSpan | None = None
    ) -> None:
        """See `base.Stream`."""
        number = next(self._numbers)

        def task() -> None:
            if self._delays is not None:
                time.sleep(delay(self._delays, self.name, number))
            if self._board.stopped:
                return
            self.doing = f"is at {label}"
            start = time.perf_counter()
            try:
                work()
            except HmcError:
                raise
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                raise ExecutionError(f"{label} failed on {self.name}: {told}") from error
            if span is not None:
                span.start, span.end = start, time.perf_counter()

        self.append(task)

    def graph(self, works: Sequence[Work], label: str) -> Work:
        """See `base.Stream`."""
        return in_order(works)

    def wait(self, event: HostEvent) -> None:
        """See `base.Stream`."""
        made = event.made
        self.append(lambda: self._await(event, made))

    def record(self, event: HostEvent) -> None:
        """See `base.Stream`."""
        event.made += 1
        made = event.made
        self.append(lambda: self.happened(event, made))

    def set_flag(self, flags: Flags, number: int) -> None:
        """See `base.Stream`."""
        epoch = flags.epoch
        self.append(lambda: flags.set(number, epoch))

    def wait_flag(self, flags: Flags, number: int) -> None:
        """See `base.Stream`."""
        epoch = flags.epoch
        self.append(lambda: self._await_flag(flags, number, epoch))

    def join(self, seconds: float) -> None:
        """Wait for the thread to end, so long at most."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def happened(self, event: HostEvent, made: int) -> None:
        """Mark a record of an event as done and wake who waits for it."""
        with self._board.lock:
            event.seen = max(event.seen, made)
            for condition in event.waiting:
                condition.notify_all()

    def _await(self, event: HostEvent, made: int) -> None:
        with self._board.lock:
            if event.seen >= made:
                return
            self.doing = "waits for an event"
            event.waiting.append(self.wake)
            while event.seen < made and not self._board.stopped:
                self.wake.wait()
            event.waiting.remove(self.wake)

    def _await_flag(self, flags: Flags, number: int, epoch: int) -> None:
        self.doing = f"waits for flag {number}"
        looks = 0
        while not flags.reached(number, epoch) and not self._board.stopped:
            looks += 1
            time.sleep(0 if looks < _SPINS else _NAP_SECONDS)

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except BaseException as error:  # whatever it is, the others must stop
                with self._board.lock:
                    self._board.fail(error)

    def _next(self) -> Callable[[], None] | None:
        """The next task, after the end of the last one; None: the board has stopped."""
        board = self._board
        with board.lock:
            if self.doing and not board.stopped:  # what is done after a stop is not to be used
                self.done += 1
                self.progress = time.perf_counter()
                if self.done in self.goals:
                    board.idle.notify_all()
            self.doing = ""
            while not self._queue and not board.stopped:
                self.wake.wait()
            if board.stopped:
                self._queue.clear()
                return None
            self.doing = "is between tasks"
            return self._queue.popleft()


def delay(seed: int, stream: str, number: int) -> float:
    """Seconds to sleep before a piece of work: mostly none or tens of microseconds, at times 300,
    so that any two streams get ahead of each other now and then."""
    random = Random(f"{seed}/{stream}/{number}")
    kind = random.random()
    if kind < 0.7:
        return 0.0
    return random.uniform(0, 60e-6) if kind < 0.95 else random.uniform(100e-6, 300e-6)
