"""A persistent pool of pinned native workers that walk programs; hides threads, the control block
and their failures.

Each worker is a daemon Python thread that enters `worker_loop` (codegen/pool/walker.py) once and
stays there, without the interpreter lock, until the pool is closed. The caller hands a program over
and sleeps: it does not work itself, because then a hanging record could not be reported, and
pinning the caller would pin every thread it starts later.

Whatever happens in the caller (Ctrl-C above all), `run` returns or raises only when no worker is in
the program any more, so buffers that records point at may be freed as soon as it is back. The one
exception is `WorkerError`.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence
from functools import cache
from types import TracebackType

import numpy as np

from hmc import env
from hmc.codegen.isa import Isa
from hmc.codegen.jit import Jit, Kernel
from hmc.codegen.pool import walker
from hmc.codegen.spec import KernelSpec
from hmc.errors import WorkerError
from hmc.machine.topology import worker_cpus

_POLL_SECONDS = 0.05
_JOIN_SECONDS = 2.0
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class Pool:
    """`cpus[w]` is where worker w stays; default: `threads` (`HMC_THREADS`) CPUs chosen by
    hmc/machine/topology.py.

    idle_spin      seconds a worker spins for the next program before it sleeps
    barrier_spin   seconds a worker spins at a barrier within a program, or for a flag, before it
                   sleeps
    watchdog       seconds one record may take before `run` raises `WorkerError`; None: no limit

    Both spins are cut to a microsecond when workers share CPUs: they would only delay each other.

    One `run` at a time; others wait. A context manager; `close` is idempotent and also happens at
    exit.
    """

    def __init__(
        self,
        jit: Jit,
        isa: Isa,
        threads: int | None = None,
        *,
        cpus: Sequence[int] | None = None,
        idle_spin: float = 50e-6,
        barrier_spin: float = 200e-6,
        watchdog: float | None = None,
    ) -> None:
        self.cpus = tuple(worker_cpus(threads or env.threads()) if cpus is None else cpus)
        self.workers = len(self.cpus)
        self.watchdog = watchdog
        self._jit = jit
        self._call = _CALL(jit.get(KernelSpec.of("pool_call", isa.name)).address)
        self._lock = threading.Lock()
        self._broken = ""
        self._read_tsc = jit.get(KernelSpec.of("read_tsc", isa.name))
        self.tsc_hz = tsc_hz(self._read_tsc)
        shared = len(set(self.cpus)) < self.workers
        self._control = _Control(self.workers)
        words = self._control.words
        words[walker.IDLE_SPIN] = int(self.tsc_hz * (1e-6 if shared else idle_spin))
        words[walker.BARRIER_SPIN] = int(self.tsc_hz * (1e-6 if shared else barrier_spin))
        words[walker.POLL_NANOSECONDS] = int(_POLL_SECONDS * 1e9)
        loop = jit.get(KernelSpec.of("worker_loop", isa.name))
        self._team = [
            _Worker(index, cpu, self.workers, loop, self._control, jit)
            for index, cpu in enumerate(self.cpus)
        ]
        self._finalizer = weakref.finalize(self, _halt, self._call, self._control, self._team, jit)
        for worker in self._team:
            worker.thread.start()

    def run(self, records: np.ndarray, trace: np.ndarray | None = None) -> bool:
        """Walk `records` (int64 [n, 4], walker's layout) once; returns when every worker is
        through: whether to the end, or only to a flag that was given up.

        `trace`, int64 [n, workers, 2], receives the time stamp counter at start and end of each
        record. Raises `WorkerError` when a worker died or a record exceeds the watchdog: the pool
        is closed then, and a worker that still hangs keeps touching the program's buffers.
        """
        if (
            records.dtype != np.int64
            or records.ndim != 2
            or records.shape[1] != walker.RECORD_WORDS
        ):
            raise ValueError(f"records must be int64 [n, 4], not {records.dtype} {records.shape}")
        if not records.flags.c_contiguous or (trace is not None and not trace.flags.c_contiguous):
            raise ValueError("records and trace must be contiguous")
        if trace is not None and (
            trace.dtype != np.int64 or trace.shape != (len(records), self.workers, 2)
        ):
            raise ValueError(f"trace must be int64 [{len(records)}, {self.workers}, 2]")
        with self._lock:
            self._finish()  # waits only when repeated Ctrl-C tore an earlier call out of its wait
            if self._broken or not self._finalizer.alive:
                raise WorkerError(self._broken or "the worker pool is closed")
            words = self._control.words
            words[walker.PROGRAM] = records.ctypes.data
            words[walker.LENGTH] = words[walker.ENDS] = len(records)
            words[walker.TRACE] = 0 if trace is None else trace.ctypes.data
            self._control.running = (records, trace)
            try:
                self._call(self._control.address, walker.RUN, self.workers)
                self._finish()
            finally:
                self._finish()  # again: Ctrl-C may strike between any two lines of Python
            return int(words[walker.ENDS]) == len(records)

    @property
    def spin_ticks(self) -> int:
        """How long a worker spins within a program, in ticks of the time stamp counter."""
        return int(self._control.words[walker.BARRIER_SPIN])

    def seconds(self, trace: np.ndarray) -> float:
        """From the first worker's first stamp to the last worker's last."""
        return float(trace[-1, :, 1].max() - trace[0, :, 0].min()) / self.tsc_hz

    def clock(self) -> tuple[int, int]:
        """One moment as (ticks of a trace, CLOCK_MONOTONIC nanoseconds)."""
        ticks, nanoseconds = _clock_pair(self._read_tsc)
        return ticks, round(nanoseconds)

    def close(self) -> None:
        """End the workers; a running program is finished first."""
        self._finalizer()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _finish(self) -> None:
        """Wait until no program runs; a Ctrl-C meanwhile is raised afterwards."""
        interrupt: KeyboardInterrupt | None = None
        progress = _Progress(self.workers, self.watchdog)
        while self._control.busy and not self._broken:
            try:
                self._call(self._control.address, walker.WAIT, self.workers)
                if self._control.busy and (trouble := self._trouble(progress)):
                    self._broken = trouble
            except KeyboardInterrupt as error:
                interrupt = error
        if self._broken and self._finalizer.alive:
            self._finalizer()
            raise WorkerError(self._broken)
        self._control.running = None
        if interrupt is not None:
            raise interrupt

    def _trouble(self, progress: _Progress) -> str:
        """Why the program will not end, or an empty string."""
        for worker in self._team:
            if not worker.alive():
                why = f": {worker.error}" if worker.error else ""
                return (
                    f"native worker {worker.index} (CPU {worker.cpu}) died{why}; the pool is closed"
                )
        if (stuck := progress.stuck(self._control.places(self.workers))) is None:
            return ""
        index, record = stuck
        records, _ = self._control.running or (np.zeros((0, 4), np.int64), None)
        tag = int(records[record, 3]) if record < len(records) else -1
        return (
            f"native worker {index} (CPU {self.cpus[index]}) has been in record {record}"
            f" (tag {tag}) for more than {self.watchdog:g} s; the pool is closed"
        )


@cache
def tsc_hz(read_tsc: Kernel) -> float:
    """Ticks a second of the time stamp counter against CLOCK_MONOTONIC over 20 ms (to about 20
    ppm)."""
    start, began = _clock_pair(read_tsc)
    time.sleep(0.02)
    stop, ended = _clock_pair(read_tsc)
    return (stop - start) / (ended - began) * 1e9


def _clock_pair(read_tsc: Kernel) -> tuple[int, float]:
    """(ticks, nanoseconds) of one moment: the tightest of several readings."""
    sink = ctypes.c_int64()
    block = ctypes.c_int64(ctypes.addressof(sink))
    call = _CALL(read_tsc.address)
    best: tuple[int, int, float] | None = None
    for _ in range(16):
        before = time.monotonic_ns()
        call(ctypes.addressof(block), 0, 1)
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, sink.value, (before + after) / 2)
    assert best is not None
    return best[1], best[2]


class _Control:
    """The control block, and what the running program must keep alive."""

    def __init__(self, workers: int) -> None:
        count = walker.control_words(workers)
        self._memory = (ctypes.c_int64 * (count + walker.LINE))()
        line = 8 * walker.LINE
        self.address = -(-ctypes.addressof(self._memory) // line) * line
        self.words = (ctypes.c_int64 * count).from_address(self.address)
        self.running: tuple[np.ndarray, np.ndarray | None] | None = None

    @property
    def busy(self) -> bool:
        return self.words[walker.FINISHED] != self.words[walker.GENERATION]

    def places(self, workers: int) -> list[tuple[int, int]]:
        """(generation, 1 + record) each worker is in."""
        generation = self.words[walker.GENERATION]
        first, line = walker.FIRST_WORKER, walker.LINE
        return [(generation, self.words[first + index * line]) for index in range(workers)]


class _Worker:
    """One thread; `error` says why it ended if Python knows."""

    def __init__(
        self, index: int, cpu: int, workers: int, loop: Kernel, control: _Control, jit: Jit
    ) -> None:
        self.index = index
        self.cpu = cpu
        self.error = ""
        self.thread = threading.Thread(
            target=self._live, args=(workers, loop, control, jit), name=f"hmc-{index}", daemon=True
        )

    def alive(self) -> bool:
        # A thread that native code ended looks alive to Python; the kernel knows better.
        number = self.thread.native_id
        return self.thread.is_alive() and os.path.exists(f"/proc/self/task/{number}")

    def _live(self, workers: int, loop: Kernel, control: _Control, jit: Jit) -> None:
        # `jit` owns the code and `control` the memory this thread is about to live in: they stay
        # for as long as it.
        try:
            os.sched_setaffinity(0, {self.cpu})
        except OSError as error:
            self.error = f"it cannot be pinned: {error.strerror}"
            return
        _CALL(loop.address)(control.address, self.index, workers)


class _Progress:
    """Notices a worker that stays in one record for longer than `limit` seconds."""

    def __init__(self, workers: int, limit: float | None) -> None:
        self._limit = limit
        self._since: list[tuple[tuple[int, int], float]] = [((-1, 0), 0.0)] * workers

    def stuck(self, places: list[tuple[int, int]]) -> tuple[int, int] | None:
        """(worker, record) of the first worker over the limit, else None."""
        if self._limit is None:
            return None
        now = time.monotonic()
        for index, place in enumerate(places):
            known, since = self._since[index]
            if known != place:
                self._since[index] = (place, now)
            elif place[1] and now - since > self._limit:
                return index, place[1] - 1
        return None


def _halt(call: ctypes._FuncPointer, control: _Control, team: list[_Worker], jit: Jit) -> None:
    """End the workers and wait for them; those that died or hang are left behind (with what they
    hold alive)."""
    try:
        while control.busy and all(worker.alive() for worker in team):
            call(control.address, walker.WAIT, len(team))
    finally:
        call(control.address, walker.HALT, len(team))
    deadline = time.monotonic() + _JOIN_SECONDS
    for worker in team:
        if worker.thread is not threading.current_thread() and worker.alive():
            worker.thread.join(max(0.0, deadline - time.monotonic()))
