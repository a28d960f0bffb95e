"""The processes of ranks 1, 2, ... as rank 0 sees them: started, listened to, and ended together.

Whatever goes wrong with one ends all. Its cause is told apart from what follows from it: a rank
that lost its connection to another one says so, and is believed to be the victim as long as another
rank died, failed for a reason of its own, or says nothing.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import TypeVar

from hmc.errors import HmcError, WorkerError
from hmc.runtime.children import Child, Stalled
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

_REMEDY = "every rank was ended; start them again"
_END_SECONDS = 5.0
_GRACE_SECONDS = 1.0
"""How long the cause of a lost connection may take to show, and a rank to say where it is."""
_SETTLE_SECONDS = 8.0
"""How long it may take to notice how a process ended, on a machine that is busy."""
_TICK_SECONDS = 0.25


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
        self._members: dict[int, Child] = {}
        self._inside, self._outside = socket.socketpair()
        self.trouble: HmcError | None = None
        try:
            for setup in setups:
                self._members[setup.rank] = Child(
                    COMMAND, setup, shared, name=f"rank {setup.rank}", remedy=_REMEDY
                )
        except BaseException:
            self._kill()
            raise
        self._listener = threading.Thread(target=self._listen, name="hmc-ranks", daemon=True)
        self._listener.start()

    @property
    def pids(self) -> dict[int, int]:
        """The process of each rank."""
        return {rank: member.pid for rank, member in self._members.items()}

    def tell(self, command: Command) -> None:
        """Send a command to every rank; raises the trouble there is."""
        for member in self._members.values():
            self.check()
            try:
                member.send(command)
            except Stalled as error:
                self.lose(error)
                raise
            except WorkerError:
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
            member.end()
        self._inside.close()

    def _kill(self) -> None:
        for member in self._members.values():
            member.kill()

    # -- listening ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        open_ = {member.fileno(): rank for rank, member in self._members.items()}
        while self.trouble is None and open_:
            ready = wait([*open_, self._inside], _TICK_SECONDS)
            if self._inside in ready:
                return
            for descriptor in open_.keys() & ready:
                rank = open_[descriptor]
                try:
                    self._take(rank, self._members[rank].hear(0.0))
                except WorkerError as error:
                    del open_[descriptor]
                    if rank not in self._victims:
                        self.lose(error)
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
            with suppress(WorkerError):  # one that cannot be asked does not answer
                self._members[rank].send(Where())
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
        name = self._members[rank].name
        self.lose(
            WorkerError(f"{name} kept the others waiting for too long, and {where}: {_REMEDY}")
        )

    def _answers(self, ranks: list[int]) -> None:
        """Take in what these ranks say now."""
        members = {self._members[rank].fileno(): rank for rank in ranks}
        for descriptor in members.keys() & wait(list(members), _TICK_SECONDS / 5):
            rank = members[descriptor]
            try:
                report = self._members[rank].hear(0.0)
            except WorkerError as error:
                self.lose(error)
                return
            self._reports[type(report), rank] = report
