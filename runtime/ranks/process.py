"""The processes of ranks 1, 2, ... as rank 0 sees them: started, listened to, and ended together.

Whatever goes wrong with one ends all. Its cause is told apart from what follows from it: a rank
that lost its connection to another one says so, and is believed to be the victim as long as another
rank died, failed for a reason of its own, or says nothing.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from hmc.errors import HmcError, WorkerError
from hmc.runtime.ranks.messages import (
    At,
    Command,
    Done,
    Failed,
    Joined,
    Ready,
    Report,
    Setup,
    Where,
)

_R = TypeVar("_R", At, Done, Joined, Ready)

COMMAND = (sys.executable, "-m", "hmc.runtime.ranks.child")

_END_SECONDS = 5.0
_GRACE_SECONDS = 1.0
"""How long the cause of a lost connection may take to show, and a rank to say where it is."""
_SETTLE_SECONDS = 8.0
"""How long it may take to notice how a process ended, on a machine that is busy."""
_TICK_SECONDS = 0.25


class RankProcess:
    """One process and the way to it."""

    def __init__(self, setup: Setup, shared: Iterable[int]) -> None:
        """`shared` are descriptors that it inherits."""
        self.rank = setup.rank
        ours, theirs = socket.socketpair()
        with theirs, os.fdopen(os.memfd_create("hmc setup"), "w+b") as file:
            pickle.dump(setup, file)
            file.seek(0)  # the process reads on where this one is
            given = [file.fileno(), theirs.fileno()]
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, given)],
                stdin=subprocess.DEVNULL,
                pass_fds=[*given, *shared],
                start_new_session=True,  # Ctrl-C is for rank 0, which knows what to end
            )
        self.connection = Connection(ours.detach())

    @property
    def dead(self) -> bool:
        """Whether it has ended; unlike `Popen.poll`, also while another thread waits for that."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self.process.pid, flags) is not None
        except ChildProcessError:
            return True

    def kill(self) -> None:
        """End it, whatever it does, and wait until it is gone."""
        self.process.kill()
        self.process.wait(_END_SECONDS)

    def ended(self) -> str:
        """How it ended, in words, after it closed its socket."""
        try:
            code = self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with status {code}, see what it wrote to stderr"


class Crew:
    """All of them, and what they reported. `end` ends them; a lost crew stays lost."""

    def __init__(
        self, setups: Iterable[Setup], shared: Iterable[int], lost: Callable[[], None]
    ) -> None:
        """`lost` is called once, when something goes wrong, after every process has ended."""
        self._changed = threading.Condition()
        self._reports: dict[tuple[type[Report], int], Report] = {}
        self._victims: dict[int, str] = {}
        self._suspected = 0.0
        self._lost = lost
        self._members: dict[int, RankProcess] = {}
        self._inside, self._outside = socket.socketpair()
        self.trouble: HmcError | None = None
        try:
            for setup in setups:
                self._members[setup.rank] = RankProcess(setup, shared)
        except BaseException:
            self._kill()
            raise
        self._listener = threading.Thread(target=self._listen, name="hmc-ranks", daemon=True)
        self._listener.start()

    @property
    def pids(self) -> dict[int, int]:
        """The process of each rank."""
        return {rank: member.process.pid for rank, member in self._members.items()}

    def tell(self, command: Command) -> None:
        """Send a command to every rank; raises the trouble there is."""
        for member in self._members.values():
            self.check()
            try:
                member.connection.send(command)
            except OSError:
                self.settle()

    def check(self) -> None:
        """Raise the trouble there is, also when a process ended a moment ago."""
        if self.trouble is None and any(member.dead for member in self._members.values()):
            self.settle()
        if self.trouble is not None:
            raise self.trouble

    def collect(self, kind: type[_R], seconds: float) -> dict[int, _R]:
        """One report of this kind from every rank, taken off; raises the trouble there is, or
        `WorkerError` naming a rank that is silent for so long."""
        until = time.monotonic() + seconds
        with self._changed:
            while missing := [r for r in self._members if (kind, r) not in self._reports]:
                if self.trouble is not None:
                    raise self.trouble
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, _TICK_SECONDS))
            if not missing:
                found = {rank: self._reports.pop((kind, rank)) for rank in self._members}
                return {rank: each for rank, each in found.items() if isinstance(each, kind)}
        self._blame(missing, seconds)
        assert self.trouble is not None
        raise self.trouble

    def suspect(self, rank: int, why: str) -> None:
        """This rank lost its connection to another one."""
        with self._changed:
            self._victims[rank] = why
            self._suspected = self._suspected or time.monotonic()

    def settle(self) -> HmcError:
        """The trouble behind a lost connection, once it is known: seconds at most."""
        until = time.monotonic() + _SETTLE_SECONDS
        with self._changed:
            while self.trouble is None and time.monotonic() < until:
                self._changed.wait(_TICK_SECONDS)
        self.lose(WorkerError("the ranks lost their connection to each other"))
        assert self.trouble is not None
        return self.trouble

    def lose(self, trouble: HmcError) -> None:
        """End every process because of `trouble`, unless that was done before."""
        with self._changed:
            if self.trouble is not None:
                return
            self.trouble = trouble
            self._kill()
            self._changed.notify_all()
        self._lost()

    def end(self) -> None:
        """End every process without further ado and free what is theirs; may be called twice."""
        with self._changed:
            self.trouble = self.trouble or WorkerError("the ranks were ended")
            self._kill()
        self._outside.close()
        if threading.current_thread() is not self._listener:
            self._listener.join(_END_SECONDS)
        for member in self._members.values():
            member.connection.close()
        self._inside.close()

    def _kill(self) -> None:
        for member in self._members.values():
            member.kill()

    # -- listening ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        open_ = {member.connection: member for member in self._members.values()}
        while self.trouble is None and open_:
            ready = wait([*open_, self._inside], _TICK_SECONDS)
            if self._inside in ready:
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                member = open_[connection]
                try:
                    self._take(member.rank, connection.recv())
                except (EOFError, OSError):
                    del open_[connection]
                    if member.rank not in self._victims:
                        self._gone(member)
            if self._suspected and time.monotonic() > self._suspected + _GRACE_SECONDS:
                self._judge()

    def _take(self, rank: int, report: Report) -> None:
        if isinstance(report, Failed):
            if report.link:
                self.suspect(rank, str(report.error))
            else:
                self.lose(type(report.error)(f"rank {rank}: {report.error}"))
            return
        with self._changed:
            self._reports[type(report), rank] = report
            self._changed.notify_all()

    def _gone(self, member: RankProcess) -> None:
        self.lose(
            WorkerError(
                f"rank {member.rank} (process {member.process.pid}) {member.ended()}: every rank"
                " was ended; start them again"
            )
        )

    def _judge(self) -> None:
        """A connection was lost, and no rank gave a cause: it is one that says nothing."""
        silent = [rank for rank in self._members if rank not in self._victims]
        if silent and 0 in self._victims:
            self._blame(silent, 0.0, threading.current_thread() is self._listener)
        elif 0 not in self._victims:
            first = min(self._victims)
            self.lose(
                WorkerError(
                    f"rank 0 kept the other ranks waiting for too long ({self._victims[first]})"
                )
            )
        else:
            self.lose(WorkerError(next(iter(self._victims.values()))))

    def _blame(self, ranks: list[int], seconds: float, listening: bool = False) -> None:
        """Lose the crew because of the first of `ranks` that does not say where it is, else of the
        first."""
        for rank in ranks:
            self._reports.pop((At, rank), None)
            try:
                self._members[rank].connection.send(Where())
            except OSError:
                continue
        until = time.monotonic() + _GRACE_SECONDS
        while (
            self.trouble is None
            and time.monotonic() < until
            and any((At, r) not in self._reports for r in ranks)
        ):
            if listening:
                self._answers(ranks)
            else:
                time.sleep(0.01)
        said = {rank: self._reports.get((At, rank)) for rank in ranks}
        rank = next((rank for rank in ranks if said[rank] is None), ranks[0])
        answer = said[rank]
        where = answer.doing if isinstance(answer, At) else "does not answer"
        pid = self._members[rank].process.pid
        self.lose(
            WorkerError(
                f"rank {rank} (process {pid}) kept the others waiting for too long, and {where}:"
                " every rank was ended; start them again"
            )
        )

    def _answers(self, ranks: list[int]) -> None:
        """Take in what these ranks say now."""
        connections = {self._members[rank].connection: rank for rank in ranks}
        for connection in wait(list(connections), _TICK_SECONDS / 5):
            assert isinstance(connection, Connection)
            try:
                report = connection.recv()
            except (EOFError, OSError):
                self._gone(self._members[connections[connection]])
                return
            self._reports[type(report), connections[connection]] = report
