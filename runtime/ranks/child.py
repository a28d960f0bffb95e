"""The process of one rank: `python -m hmc.runtime.ranks.child SETUP SOCKET` (descriptors), started
by runtime/ranks/group.py only.

The main thread computes and sleeps between calls; a second one reads commands, answers where the
streams are, and ends the process when rank 0 closes the socket or is gone.
"""

from __future__ import annotations

import os
import queue
import sys
from pathlib import Path

import numpy as np
import torch

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.errors import ExecutionError, HmcError
from hmc.plan import Plan, Step
from hmc.runtime.binding.memory import LentMemory
from hmc.runtime.binding.phase import Binding, BoundPhase
from hmc.runtime.binding.warm import warm
from hmc.runtime.children import adopted
from hmc.runtime.device_ops.base import Work
from hmc.runtime.device_ops.link import Link
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.devices.cuda import CudaBackend
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.host.lowering import Parts
from hmc.runtime.host.pool import Pool
from hmc.runtime.memory.kv import KVCache
from hmc.runtime.ranks.messages import At, Begin, Command, Done, Failed, Prefill, Setup, Where
from hmc.runtime.schedule.runner import ScheduleRunner


class Rank:
    """One rank's part of some phases, bound and ready to be run until its process ends."""

    def __init__(self, setup: Setup, lent: LentMemory) -> None:
        plan, store = setup.weights.open()
        ranks = plan.phase(setup.phases[0]).ranks
        self.link = Link(setup.rank, ranks, setup.seconds)
        self._setup = setup
        self._doing: dict[str, str] = {}
        self.backend = _opened(plan, setup, ranks)
        torch.set_num_threads(setup.threads)
        jit = Jit(EMITTERS)
        pool = Pool(jit, TIERS[plan.isa], setup.threads)
        # An empty cache, never written: rank 0 has the cache, and sends what is read of it.
        kv = KVCache(plan.kv, plan.limits.max_context)
        self._binding = Binding(
            Parts(plan, store, kv, jit, pool),
            self.backend.devices,
            names=setup.phases,
            pin=setup.devices == "cuda",
            link=self.link,
            lent=lent,
        )
        self._parts = {
            name: (bound, ScheduleRunner(bound.phase, self.backend, self._noted(bound)))
            for name, bound in self._binding.phases.items()
        }
        warm(self._binding.phases.values(), self.backend)

    def join(self) -> None:
        """Connect to the other ranks."""
        place = self.backend.devices[self._setup.rank].torch_device
        self.link.connect(Path(self._setup.meeting), place)

    def prefill(self, command: Prefill) -> None:
        """Run this rank's part of a call."""
        positions = np.arange(command.past, command.past + len(command.ids), dtype=np.int32)
        nothing = np.zeros(0, np.int32)
        bound, runner = self._parts[command.phase]
        runner.run_untimed(bound.call(command.ids, positions, np.zeros_like(positions), nothing))

    @property
    def doing(self) -> str:
        """The steps under way."""
        return "; ".join(self._doing.values()) or "is idle"

    def _noted(self, bound: BoundPhase) -> list[Work]:
        """The works of a phase, with `doing` kept true."""

        def noted(step: Step, work: Work) -> Work:
            def both(call: Call) -> None:
                self._doing[step.resource] = f"is at step {step.id} ({step.op}, layer {step.layer})"
                work(call)
                del self._doing[step.resource]

            return both

        return [
            noted(step, work) for step, work in zip(bound.phase.steps, bound.works, strict=True)
        ]


def _opened(plan: Plan, setup: Setup, ranks: int) -> CudaBackend | HostBackend:
    limit = 2 * setup.seconds + 60  # the link's own limit is to be the first
    if setup.devices == "cuda":
        return CudaBackend(ranks, home=setup.rank, timeout=limit)
    sizes = [gpu.memory_bytes for gpu in plan.machine.gpus[:ranks]]
    return HostBackend(ranks, sizes, delays=setup.delays, timeout=limit)


def main(arguments: list[str]) -> int:
    """Serve calls until rank 0 closes the socket; 1 when something failed, which was reported."""
    setup, parent = adopted(arguments)
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    rank: Rank | None = None

    def take(command: Command) -> None:
        if isinstance(command, Where):
            parent.send(At("is getting ready" if rank is None else rank.doing))
        else:
            commands.put(command)

    parent.listen(take)
    try:
        while True:
            command = commands.get()  # the process ends with its parent, so it may wait
            if isinstance(command, Begin):
                rank = Rank(setup, command.memory[setup.rank])
            else:
                assert rank is not None, "rank 0 says Begin first"
                rank.prefill(command) if isinstance(command, Prefill) else rank.join()
            parent.send(Done())
    except HmcError as error:
        parent.send(Failed(error, rank is not None and rank.link.failed))
    except Exception as error:
        parent.send(Failed(ExecutionError(f"{type(error).__name__}: {error}"), link=False))
    os._exit(1)  # a step that hangs must not keep the process, or its GPU, alive


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
