"""The prefill process as its parent holds it: started, spoken to, ended; hides descriptors, the
socket and signals.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection

from hmc.errors import WorkerError
from hmc.runtime.prefill.messages import Command, Report, Setup

_END_SECONDS = 1.0
_SEND_LIMIT = struct.pack("ll", 2, 0)
"""A struct timeval: a process that does not read for so long is stopped or worse."""


class PrefillProcess:
    """A running runtime/prefill/child.py. It ends with `end`, with this object, or when this
    process does: its socket is closed then. (Not by PR_SET_PDEATHSIG: that tells of the end of the
    *thread* that started it.)
    """

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_LIMIT)
        with theirs, os.fdopen(os.memfd_create("hmc setup"), "w+b") as file:
            pickle.dump(setup, file)
            file.seek(0)  # it reads on where this process is
            given = [file.fileno(), theirs.fileno()]
            shared = [setup.cache, *([] if setup.weights is None else [setup.weights])]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hmc.runtime.prefill.child", *map(str, given)],
                stdin=subprocess.DEVNULL,
                pass_fds=given + shared,
                start_new_session=True,  # Ctrl-C is for the parent, which knows what to end
            )
        self._connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, self._process, self._connection)
        """End it within seconds, whatever it does; a second call does nothing."""

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Raises `WorkerError` when it is gone, or takes nothing for two seconds."""
        try:
            self._connection.send(command)
        except OSError:
            raise self._gone() from None

    def report(self, timeout: float) -> Report | None:
        """What it says next, None when it says nothing for `timeout` seconds. Raises `WorkerError`
        when it is gone and all it said was taken.
        """
        try:
            if not self._connection.poll(timeout):
                return None
            found: Report = self._connection.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        return found

    def _gone(self) -> WorkerError:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            how = "closed its socket"
        else:
            how = f"ended with status {code}, see what it wrote to stderr"
            if code < 0:
                how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return WorkerError(f"the prefill process {how}: restart it and start its jobs again")


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
