"""The prefill process: `python -m hmc.runtime.prefill.child SETUP SOCKET` (descriptors), started by
runtime/prefill/worker.py only.

The main thread computes; a second one reads commands, so that a cancelled job ends at its next
chunk, and ends the process when the parent closes the socket or is gone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from contextlib import ExitStack
from pathlib import Path

from hmc.errors import HmcError, WorkerError
from hmc.plan import Plan
from hmc.runtime.children import Parent, adopted
from hmc.runtime.executor import PREFILL, Executor
from hmc.runtime.memory.kv import KVCache, Sequence, cache_bytes
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.prefill.messages import Cancel, Ready, Report, Setup, Start, cancelled
from hmc.runtime.weights.store import WeightStore


class Mailbox:
    """Jobs to do, in order, and who was told to stop."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._changed = threading.Condition()
        self._waiting: deque[Start] = deque()
        self._current = -1
        self._stop = False
        parent.listen(self._take)

    def next(self) -> Start:
        """The next job, once there is one: the process ends with its parent, so it may wait."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            start = self._waiting.popleft()
            self._current, self._stop = start.job, False
            return start

    @property
    def stop(self) -> bool:
        """Whether the job under way was cancelled."""
        return self._stop

    def _take(self, command: Start | Cancel) -> None:
        with self._changed:
            if isinstance(command, Start):
                self._waiting.append(command)
                self._changed.notify()
            elif isinstance(command, Cancel):
                found = next((each for each in self._waiting if each.job == command.job), None)
                if found is not None:
                    self._waiting.remove(found)
                    self._parent.send(Report(command.job, 0, error=cancelled()))
                self._stop = self._stop or command.job == self._current


def main(arguments: list[str]) -> int:
    """Serve jobs until the parent closes the socket; 1 when the setup cannot be used."""
    setup, parent = adopted(arguments)
    os.sched_setaffinity(0, setup.cpus)
    mailbox = Mailbox(parent)
    with ExitStack() as stack:
        try:
            executor = _opened(setup, stack)
        except HmcError as error:
            parent.send(Ready(error))
            return 1
        parent.send(Ready())
        while True:
            _prefill(executor, parent, mailbox, mailbox.next())


def _opened(setup: Setup, stack: ExitStack) -> Executor:
    plan = Plan.model_validate_json(setup.plan)
    directory = Path(setup.directory) if setup.directory else None
    if setup.weights is None:
        store = WeightStore.open(plan, directory)
    else:
        store = WeightStore.attach(plan, setup.weights)
    stack.callback(store.close)
    size = cache_bytes(plan.kv)
    memory = SharedBlock.attach(setup.cache, size, "shared KV cache", write=True)
    kv = KVCache(plan.kv, plan.limits.max_context, memory)
    stack.callback(kv.close)
    # Which block is whose is the parent's business: here none is ever free.
    kv.allocator.take(kv.allocator.count)
    executor = Executor(plan, directory, store=store, kv=kv, cpus=setup.cpus, only=PREFILL)
    stack.callback(executor.close)
    return executor


def _prefill(executor: Executor, parent: Parent, mailbox: Mailbox, start: Start) -> None:
    sequence = Sequence(0)
    sequence.blocks, sequence.length = list(start.blocks), start.past
    executor.kv.tables[0] = 0
    executor.kv.tables[0, : len(start.blocks)] = start.blocks
    try:
        for logits in executor.prefill(sequence, start.ids, phase=PREFILL):
            tokens = sequence.length - start.past
            if tokens == len(start.ids):
                parent.send(Report(start.job, tokens, logits[0].copy()))
            elif mailbox.stop:
                parent.send(Report(start.job, tokens, error=cancelled()))
                return
            else:
                parent.send(Report(start.job, tokens))
    except WorkerError:
        raise  # nothing can be computed here any more: the parent sees the process end
    except HmcError as error:
        parent.send(Report(start.job, sequence.length - start.past, error=error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
