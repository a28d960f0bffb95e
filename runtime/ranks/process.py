"""The processes of ranks 1, 2, ... as rank 0 sees them: started, listened to, and ended together.

Whatever goes wrong with one ends all. Its cause is told apart from what follows from it: a rank
that lost its connection to another one says so, and is believed to be the victim as long as another
rank died, failed for a reason of its own, or says nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import wait

from hmc.errors import HmcError, WorkerError
from hmc.runtime.children import Child, Stalled
from hmc.runtime.ranks.messages import At, Command, Done, Report, Setup, Where

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
        self._done: set[int] = set()
        self._at: dict[int, str] = {}
        self._victims: dict[int, str] = {}
        self._suspected = 0.0
        self._lost = lost
        self._members: dict[int, Child] = {}
        self.trouble: HmcError | None = None
        try:
            for setup in setups:
                self._members[setup.rank] = Child(
                    COMMAND, setup, shared, name=f"rank {setup.rank}", remedy=_REMEDY
                )
        except BaseException:
            self._kill()
            raise
        self._open = {member.fileno(): rank for rank, member in self._members.items()}
        self._listener = threading.Thread(target=self._listen, name="hmc-ranks", daemon=True)
        self._listener.start()

    @property
    def pids(self) -> dict[int, int]:
        """The process of each rank."""
        return {rank: member.pid for rank, member in self._members.items()}

    def tell(self, command: Command) -> None:
        """Send a command to every rank; raises the trouble there is, also when a process ended a
        moment ago."""
        if self.trouble is None and any(member.dead for member in self._members.values()):
            self.settle()
        for member in self._members.values():
            if self.trouble is not None:
                raise self.trouble
            try:
                member.send(command)
            except Stalled as error:
                self.lose(error)
                raise
            except WorkerError:
                self.settle()

    def collect(self, seconds: float) -> None:
        """Wait until every rank has done what it was told; raises the trouble there is, or
        `WorkerError` naming a rank that is silent for so long."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.trouble is not None or len(self._done) == len(self._members), seconds
            )
            missing = sorted(self._members.keys() - self._done)
            self._done.clear()
        if self.trouble is None and missing:
            self._blame(missing)
        if self.trouble is not None:
            raise self.trouble

    def suspect(self, rank: int, why: str) -> None:
        """This rank lost its connection to another one."""
        with self._changed:
            self._victims[rank] = why
            self._suspected = self._suspected or time.monotonic()

    def settle(self) -> HmcError:
        """The trouble behind a lost connection, once it is known: seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self.trouble is not None, _SETTLE_SECONDS)
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
        if threading.current_thread() is not self._listener:
            self._listener.join(_END_SECONDS)
        for member in self._members.values():
            member.end()

    def _kill(self) -> None:
        for member in self._members.values():
            member.kill()

    # -- listening ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        while self.trouble is None and self._open:
            self._hear(_TICK_SECONDS)
            if self._suspected and time.monotonic() > self._suspected + _GRACE_SECONDS:
                self._judge()

    def _hear(self, seconds: float) -> None:
        """Take in what ranks say within so long."""
        for descriptor in self._open.keys() & wait(self._open, seconds):
            rank = self._open[descriptor]
            try:
                self._take(rank, self._members[rank].hear(0.0))
            except WorkerError as error:
                del self._open[descriptor]
                if rank not in self._victims:
                    self.lose(error)

    def _take(self, rank: int, report: Report) -> None:
        if isinstance(report, At):
            self._at[rank] = report.doing
        elif isinstance(report, Done):
            with self._changed:
                self._done.add(rank)
                self._changed.notify_all()
        elif report.link:
            self.suspect(rank, str(report.error))
        else:
            self.lose(type(report.error)(f"rank {rank}: {report.error}"))

    def _judge(self) -> None:
        """A connection was lost, and no rank gave a cause: it is one that says nothing."""
        silent = [rank for rank in self._members if rank not in self._victims]
        first = next(iter(self._victims.values()))
        if 0 not in self._victims:
            self.lose(WorkerError(f"rank 0 kept the other ranks waiting for too long ({first})"))
        elif silent:
            self._blame(silent)
        else:
            self.lose(WorkerError(first))

    def _blame(self, ranks: list[int]) -> None:
        """Lose the crew because of the first of `ranks` that does not say where it is, else of the
        first."""
        for rank in ranks:
            self._at.pop(rank, None)
            with suppress(WorkerError):  # one that cannot be asked does not answer
                self._members[rank].send(Where())
        until = time.monotonic() + _GRACE_SECONDS
        while self.trouble is None and time.monotonic() < until and not self._at.keys() >= {*ranks}:
            if threading.current_thread() is self._listener:
                self._hear(_TICK_SECONDS / 5)
            else:
                time.sleep(0.01)
        rank = next((rank for rank in ranks if rank not in self._at), ranks[0])
        name, where = self._members[rank].name, self._at.get(rank, "does not answer")
        self.lose(
            WorkerError(f"{name} kept the others waiting for too long, and {where}: {_REMEDY}")
        )
