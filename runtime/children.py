"""Processes that compute for this one: started with a setup, told, heard and ended; hides
descriptors, the socket between the two sides, signals and deadlines.

    child = Child(command, setup, [descriptor], name="the prefill worker", remedy="restart it")
    child.send(Start(...))
    report = child.hear(0.1)        # None: nothing was said
    child.end()

    setup, parent = adopted(sys.argv[1:])      # over there
    parent.listen(take)                        # in a thread; ends the process when its parent ends
    parent.send(Ready())

Nobody waits for ever for a process that is stopped or hangs: a message that it does not take, or
does not finish, counts as its end. Its stderr is this process's own, so no pipe of ours fills up.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from hmc.errors import WorkerError

_STALL_SECONDS = 3
"""A process that goes on with a message for so long is stopped, or worse."""
_END_SECONDS = 1.0
_REAP_SECONDS = 5.0
_PARENT_CHECK_SECONDS = 1.0


class Stalled(WorkerError):
    """The process lives, but does not take a message, or does not finish one."""


class Child:
    """A process of this one. It ends with `end`, with this object, or when this process does: its
    socket is closed then. (Not by PR_SET_PDEATHSIG: that tells of the end of the *thread* that
    started it.) `fileno` is for `multiprocessing.connection.wait`.
    """

    def __init__(
        self,
        command: Sequence[str],
        setup: object,
        shared: Iterable[int],
        *,
        name: str,
        remedy: str,
    ) -> None:
        """Run `command` with two descriptors as its last arguments, which `adopted` takes; it also
        inherits those in `shared`, under their numbers. `name` and what to do (`remedy`) are told
        when it is gone.
        """
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _STALL_SECONDS, 0))
        self._connection = Connection(ours.detach())
        with theirs, os.fdopen(os.memfd_create("hmc setup"), "w+b") as file:
            pickle.dump((os.getpid(), setup), file)
            file.seek(0)  # it reads on where this process is
            given = [file.fileno(), theirs.fileno()]
            self._process = subprocess.Popen(
                [*command, *map(str, given)],
                stdin=subprocess.DEVNULL,
                pass_fds=[*given, *shared],
                start_new_session=True,  # Ctrl-C is for the parent, which knows what to end
            )
        self.pid = self._process.pid
        self.name = f"{name} (process {self.pid})"
        self._remedy = remedy
        self.end = weakref.finalize(self, _end, self._process, self._connection)
        """End it within seconds, whatever it does; a second call does nothing."""

    def send(self, message: object) -> None:
        """Raises `WorkerError` when it is gone, `Stalled` when it does not take the message."""
        try:
            self._connection.send(message)
        except BlockingIOError:
            raise self._stalled() from None
        except OSError:
            raise self._gone() from None

    def hear(self, timeout: float) -> Any:
        """What it says next, None when it says nothing for `timeout` seconds. Raises `WorkerError`
        when it is gone and all it said was taken, `Stalled` when it stops in the middle.
        """
        try:
            return self._connection.recv() if self._connection.poll(timeout) else None
        except BlockingIOError:
            raise self._stalled() from None
        except (EOFError, OSError):
            raise self._gone() from None

    def fileno(self) -> int:
        """The descriptor that is readable when there is something to hear."""
        return self._connection.fileno()

    @property
    def dead(self) -> bool:
        """Whether it has ended; unlike `Popen.poll`, also while another thread waits for that."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self.pid, flags) is not None
        except ChildProcessError:
            return True

    def kill(self) -> None:
        """End it at once; what it has said can still be heard."""
        _kill(self._process)

    def _gone(self) -> WorkerError:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            how = "closed its socket"
        else:
            how = f"ended with status {code}, see what it wrote to stderr"
            if code < 0:
                how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return WorkerError(f"{self.name} {how}: {self._remedy}")

    def _stalled(self) -> Stalled:
        return Stalled(
            f"{self.name} did not go on with a message for {_STALL_SECONDS} s: {self._remedy}"
        )


class Parent:
    """The other side, as a child holds it."""

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection, self._pid = connection, pid
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Tell the parent something, from any thread. A parent that is stopped is waited for: it
        goes on, or ends, and then this process does."""
        with self._sending:
            self._connection.send(message)

    def listen(self, take: Callable[[Any], None]) -> None:
        """Call `take` with every message, in a thread; the process ends when its parent has closed
        the socket or is gone."""
        threading.Thread(
            target=self._listen, args=(take,), name="hmc-commands", daemon=True
        ).start()

    def _listen(self, take: Callable[[Any], None]) -> None:
        while True:
            try:
                if self._connection.poll(_PARENT_CHECK_SECONDS):
                    take(self._connection.recv())
                elif os.getppid() != self._pid:
                    os._exit(0)  # somebody else still holds the socket open
            except (EOFError, OSError):
                os._exit(0)


def adopted(arguments: Sequence[str]) -> tuple[Any, Parent]:
    """In the child: the setup that it was started with, and its parent."""
    setup_file, connection = map(int, arguments)
    with os.fdopen(setup_file, "rb") as file:
        pid, setup = pickle.load(file)
    return setup, Parent(Connection(connection), pid)


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    try:
        process.wait(_REAP_SECONDS)
    except subprocess.TimeoutExpired:
        # Nothing else can be done: it is in the kernel, and is gone when it comes out of there.
        return
