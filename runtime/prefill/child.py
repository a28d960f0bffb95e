"""The prefill process: `python -m hmc.runtime.prefill.child SETUP SOCKET` (descriptors), started by
runtime/prefill/worker.py only.

The main thread computes; a second one reads commands, so that a cancelled prompt ends with its
chunk, and ends the process when the parent closes the socket or is gone.
"""

from __future__ import annotations

import os
import sys
import threading
from queue import SimpleQueue

from hmc.errors import HmcError, WorkerError
from hmc.plan.phases import PREFILL
from hmc.runtime.children import Parent, adopted
from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import KVCache, Sequence, cache_bytes
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.phases.beside import cancelled
from hmc.runtime.prefill.messages import Cancel, Ready, Report, Setup, Start


def main(arguments: list[str]) -> int:
    """Serve prompts until the parent closes the socket; 1 when the setup cannot be used."""
    setup, parent = adopted(arguments)
    os.sched_setaffinity(0, setup.cpus)
    prompts: SimpleQueue[Start] = SimpleQueue()
    stop = threading.Event()

    def take(command: Start | Cancel) -> None:
        if isinstance(command, Cancel):
            stop.set()
        else:
            stop.clear()
            prompts.put(command)

    parent.listen(take)
    try:
        executor = _opened(setup)
    except HmcError as error:
        parent.send(Ready(error))
        return 1
    parent.send(Ready())
    while True:
        _prefill(executor, parent, stop, prompts.get())  # ends with its parent, so it may wait


def _opened(setup: Setup) -> Executor:
    plan, store = setup.weights.open()
    size = cache_bytes(plan.kv)
    memory = SharedBlock.attach(setup.cache, size, "shared KV cache", write=True)
    kv = KVCache(plan.kv, plan.limits.max_context, memory)
    # Which block is whose is the parent's business: here none is ever free.
    kv.allocator.take(kv.allocator.count)
    return Executor(plan, None, store=store, kv=kv, cpus=setup.cpus, only=PREFILL)


def _prefill(executor: Executor, parent: Parent, stop: threading.Event, start: Start) -> None:
    kv, sequence = executor.kv, Sequence(start.row)
    sequence.blocks, sequence.length = list(start.blocks), start.past
    sequence.stops = tuple(sorted(stop for stop, _ in start.snapshots))
    slots = {stop.tokens: slot for stop, slot in start.snapshots}
    kv.tables[start.row] = 0
    kv.tables[start.row, : len(start.blocks)] = start.blocks
    try:
        for logits in executor.prefill(sequence, start.ids, phase=PREFILL):
            if sequence.length in slots:
                kv.copy(start.row, slots[sequence.length], sequence.length)
            tokens = sequence.length - start.past
            if tokens == len(start.ids):
                parent.send(Report(tokens, logits[0].copy()))
            elif stop.is_set():
                parent.send(Report(tokens, error=cancelled()))
                return
            else:
                parent.send(Report(tokens))
    except WorkerError:
        raise  # nothing can be computed here any more: the parent sees the process end
    except HmcError as error:
        parent.send(Report(sequence.length - start.past, error=error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
