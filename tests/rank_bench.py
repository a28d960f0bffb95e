"""A plan that GPUs share, run by processes, by all ranks in one process, and by the CPU alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from split_plans import STREAM, split_plan

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.compiler import compile as compile_plan
from hmc.plan import Plan
from hmc.runtime.binding.memory import LentMemory
from hmc.runtime.binding.phase import Binding, BoundPhase
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.executor import Executor
from hmc.runtime.host.lowering import Parts
from hmc.runtime.host.pool import Pool
from hmc.runtime.memory.kv import KVCache, Sequence
from hmc.runtime.ranks.group import GroupRunner, RankGroup
from hmc.runtime.schedule.runner import ScheduleRunner
from hmc.runtime.weights.store import WeightStore

Rows = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


@dataclass
class Bench:
    """One plan: rank 0 here, the others in their processes; where it is compared, all of them here
    as well, and the CPU plan."""

    plan: Plan
    store: WeightStore
    kv: KVCache
    group: RankGroup
    binding: Binding
    ranked: GroupRunner
    together: BoundPhase | None = None
    runner: ScheduleRunner | None = None
    host: Executor | None = None

    def by_processes(self, sequence: Sequence, ids: Ids, wanted: int = 1) -> Rows:
        """Append tokens; the last `wanted` ones' logits."""
        bound = self.binding.phases[STREAM]
        call = bound.call(*self._call(sequence, ids, wanted))
        self.ranked.run_untimed(call)
        return bound.logits(call).copy()

    def in_process(self, sequence: Sequence, ids: Ids, wanted: int = 1) -> Rows:
        """As `by_processes`, by all ranks in this process."""
        assert self.together is not None
        assert self.runner is not None
        call = self.together.call(*self._call(sequence, ids, wanted))
        self.runner.run_untimed(call)
        return self.together.logits(call).copy()

    @property
    def memory(self) -> dict[int, LentMemory]:
        """By rank, what rank 0 has for it."""
        return self.binding.lend()

    def spoil(self, rank: int) -> None:
        """Put zeros where the experts of a rank's GPU are."""
        for _, raw in self.binding._memory[f"gpu{rank}"].experts.values():
            raw.zero_()

    def _call(self, sequence: Sequence, ids: Ids, wanted: int) -> tuple[Ids, Ids, Ids, Ids]:
        self.kv.reserve(sequence, len(ids))
        start = sequence.length
        sequence.length += len(ids)
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        table = np.full(len(ids), sequence.row, np.int32)
        return ids, positions, table, np.arange(len(ids) - wanted, len(ids), dtype=np.int32)


@contextmanager
def bench(
    directory: Path, gpus: int, seconds: float = 60.0, *, compared: bool = False
) -> Iterator[Bench]:
    """Ranks of a checkpoint's plan, ready to be called; half of the experts are streamed."""
    plan = split_plan(directory, gpus=gpus, beside=1 << 30)
    with ExitStack() as stack:
        store = WeightStore.open(plan, directory)
        stack.callback(store.close)
        group = stack.enter_context(
            RankGroup(
                plan,
                "host",
                store=store,
                directory=directory,
                threads=1,
                seconds=seconds,
                delays=gpus,
            )
        )
        jit = Jit(EMITTERS)
        pool = stack.enter_context(Pool(jit, TIERS[plan.isa], 2))
        kv = KVCache(plan.kv, plan.limits.max_context)
        stack.callback(kv.close)
        sizes = [gpu.memory_bytes for gpu in plan.machine.gpus]
        parts = Parts(plan, store, kv, jit, pool)
        found = []
        for link in (group.link, None)[: 1 + compared]:
            backend = HostBackend(gpus, sizes, shared=link is not None)
            stack.callback(backend.close)
            binding = stack.enter_context(
                Binding(
                    parts,
                    backend.devices,
                    names=[STREAM],
                    link=link,
                )
            )
            found.append((binding.phases[STREAM], backend))
            if link is not None:
                group.begin(binding.lend(), backend.devices[0].torch_device)
                ranked = binding
        runner = GroupRunner(group, *found[0], found[0][0].works)
        result = Bench(plan, store, kv, group, ranked, runner)
        if compared:
            whole, backend = found[1]
            host = compile_plan(directory, max_context=256, max_chunk=64, threads=2)
            result.together = whole
            result.runner = ScheduleRunner(whole.phase, backend, whole.works)
            result.host = Executor(host, directory, threads=2)
            stack.callback(result.host.close)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # as in the other ranks: sums in the same order
        yield result


def host_logits(found: Bench, ids: Ids) -> Rows:
    """Logits of every token of a prompt, by the CPU plan."""
    executor = found.host
    assert executor is not None
    sequence = executor.open()
    parts = [part.copy() for part in executor.prefill(sequence, ids, every=True)]
    executor.release(sequence)
    return np.concatenate(parts)
