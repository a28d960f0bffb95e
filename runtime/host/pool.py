"""A persistent pool of pinned native workers that walk programs; hides threads, the control block
and their failures.

Each worker is a daemon Python thread that enters `worker_loop` (codegen/pool/walker.py) once and
stays there, without the interpreter lock, until the pool is closed. The caller hands a program over
and sleeps: it does not work itself, because then a hanging record could not be reported, and
pinning the caller would pin every thread it starts later.

Whatever happens in the caller (Ctrl-C above all), `run` returns or raises only when no worker is in
the program any more, so buffers that records point at may be freed as soon as it is back. The one
exception is `WorkerError`: a native worker that hangs cannot be ended, so it is left behind, and
what it may still touch stays until the process ends. Its thread is a daemon that never comes back
from native code: it holds the control block, which holds the records and the owners that said
`uses`, and nothing that Python does at exit takes a thread's frame apart.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import numpy as np

from hmc import env
from hmc.closing import Closing
from hmc.codegen.isa import Isa
from hmc.codegen.jit import Jit, Kernel
from hmc.codegen.pool import walker
from hmc.codegen.spec import KernelSpec
from hmc.errors import WorkerError
from hmc.machine.topology import this_machine, worker_cpus

_IDLE_SPIN, _BARRIER_SPIN, _SHARED_SPIN = 50e-6, 200e-6, 1e-6
"""Seconds that a worker spins before it sleeps: for the next program; at a barrier within one, or
for a flag; and for either where workers share CPUs, and would only delay each other."""
_POLL_SECONDS = 0.05
_JOIN_SECONDS = 2.0
_RECORD_SECONDS = 300.0
"""One record may take so long; the largest reads some GiB of weights from a disk."""
_LEAVE_SECONDS = 10.0
"""The same once somebody wants to leave: after Ctrl-C, and when the pool is closed."""
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class Pool(Closing):
    """`cpus[w]` is where worker w stays; default: `threads` (`HMC_THREADS`) CPUs chosen by
    hmc/machine/topology.py.

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
    ) -> None:
        self.cpus = tuple(worker_cpus(threads or env.threads()) if cpus is None else cpus)
        self.workers = len(self.cpus)
        self.teams = this_machine().teams(self.cpus)
        """Its workers by NUMA node."""
        self._call = _CALL(jit.get(KernelSpec.of("pool_call", isa.name)).address)
        self._lock = threading.Lock()
        self._broken = ""
        self._read_tsc = jit.get(KernelSpec.of("read_tsc", isa.name))
        self.tsc_hz = tsc_hz(self._read_tsc)
        shared = len(set(self.cpus)) < self.workers
        self._control = _Control(self.workers, [len(team.cpus) for team in self.teams])
        words = self._control.words
        words[walker.IDLE_SPIN] = int(self.tsc_hz * (_SHARED_SPIN if shared else _IDLE_SPIN))
        words[walker.BARRIER_SPIN] = int(self.tsc_hz * (_SHARED_SPIN if shared else _BARRIER_SPIN))
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
        record. Raises `WorkerError` when a worker died, or stays in one record for five minutes
        (for ten seconds after Ctrl-C): the pool is closed then, see `left_behind`.
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
        with self._lock:  # whoever has it ends: `_finish` gives up a program that hangs
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
    def team_table(self) -> int:
        """Address of the table of `teams` that kernels take (codegen/decode/teams.py)."""
        return self._control.teams.ctypes.data

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

    def uses(self, owner: object) -> None:
        """Programs touch memory of `owner`: when a worker is left behind, `owner` lives on."""
        self._control.users.add(owner)

    @property
    def left_behind(self) -> bool:
        """Whether a worker hangs in a program: memory that it uses must not be given back."""
        return bool(self._control.kept)

    def close(self) -> None:
        """End the workers; a running program is finished first, unless it hangs."""
        self._finalizer()

    def _finish(self) -> None:
        """Wait until no program runs; a Ctrl-C meanwhile is raised afterwards."""
        interrupt: KeyboardInterrupt | None = None
        progress = _Progress(self._control, self._team)
        while self._control.busy and not self._broken:
            try:
                self._call(self._control.address, walker.WAIT, self.workers)
                if interrupt is None:
                    self._broken = progress.trouble(_RECORD_SECONDS)
                else:
                    self._broken = progress.trouble(_LEAVE_SECONDS)
            except KeyboardInterrupt as error:
                if interrupt is None:
                    progress.begin()
                interrupt = error
        if self._broken and self._finalizer.alive:
            self._control.hangs = True
            self._finalizer()
            raise WorkerError(self._broken) from interrupt
        self._control.running = None
        if interrupt is not None:
            raise interrupt


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
    """The control block, and what the workers' programs must keep alive."""

    def __init__(self, workers: int, teams: Sequence[int]) -> None:
        """Of so many workers, and how many of them each team has."""
        count = walker.control_words(workers)
        self._memory = (ctypes.c_int64 * (count + walker.LINE))()
        line = 8 * walker.LINE
        self.address = -(-ctypes.addressof(self._memory) // line) * line
        self.words = (ctypes.c_int64 * count).from_address(self.address)
        self.teams = np.array([len(teams), 0, *accumulate(teams)], np.int64)
        self.words[walker.TEAMS] = len(teams)
        self.words[walker.BOUNDS] = self.teams.ctypes.data + self.teams.itemsize
        self.running: tuple[np.ndarray, np.ndarray | None] | None = None
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        self.kept: list[object] = []
        self.hangs = False  # known, so nobody waits for it again

    @property
    def busy(self) -> bool:
        return self.words[walker.FINISHED] != self.words[walker.GENERATION]

    def leave_behind(self) -> None:
        """A worker will not end: what it may touch stays for as long as its thread, which holds
        this block."""
        self.kept = [self, *self.users]

    def place(self, worker: int) -> tuple[int, int]:
        """(generation, 1 + record) a worker is in."""
        word = self.words[walker.FIRST_WORKER + worker * walker.LINE]
        return self.words[walker.GENERATION], word


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
    """Notices a worker that died, or stays in one record for too long."""

    def __init__(self, control: _Control, team: list[_Worker]) -> None:
        self._control, self._team = control, team
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._since: dict[int, tuple[tuple[int, int], float]] = {}

    def trouble(self, limit: float) -> str:
        """Why the program will not end when a record may take `limit` seconds; "" when it ended,
        or may."""
        if not self._control.busy:
            return ""
        for worker in self._team:
            if not worker.alive():
                why = f": {worker.error}" if worker.error else ""
                return (
                    f"native worker {worker.index} (CPU {worker.cpu}) died{why}; the pool is closed"
                )
        now = time.monotonic()
        stuck = []
        for index in range(len(self._team)):
            place = self._control.place(index)
            known, since = self._since.get(index, ((-1, 0), now))
            if known != place:
                self._since[index] = (place, now)
            elif place[1] and now - since > limit:
                stuck.append((place[1] - 1, index))
        if not stuck:
            return ""
        record, index = min(stuck)  # the others wait for it
        records, _ = self._control.running or (np.zeros((0, 4), np.int64), None)
        tag = int(records[record, 3]) if record < len(records) else -1
        return (
            f"native worker {index} (CPU {self._team[index].cpu}) hangs: it has been in record"
            f" {record} (tag {tag}) for more than {limit:g} s; the pool is closed"
        )


def _halt(call: ctypes._FuncPointer, control: _Control, team: list[_Worker], jit: Jit) -> None:
    """End the workers and wait for them; those that died are gone, those that hang are left behind
    with what they hold alive."""
    progress = _Progress(control, team)
    try:
        while control.busy and not control.hangs and not progress.trouble(_LEAVE_SECONDS):
            call(control.address, walker.WAIT, len(team))
    finally:
        call(control.address, walker.HALT, len(team))
    deadline = time.monotonic() + _JOIN_SECONDS
    for worker in team:
        if worker.thread is not threading.current_thread() and worker.alive():
            worker.thread.join(max(0.0, deadline - time.monotonic()))
    if any(worker.alive() for worker in team):
        control.leave_behind()
