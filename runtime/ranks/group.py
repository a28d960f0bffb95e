"""Several GPUs on one prompt, each driven by a process of its own (a *rank*); hides the processes,
how they meet, and how they end.

    group = RankGroup(plan, devices="cuda", store=store, directory=directory)   # starts ranks 1..
    binding = Binding(parts, backend.devices, link=group.link)                     # rank 0 is here
    group.begin(binding.lend(), place)            # the others use the memory that it has for them
    runner = GroupRunner(group, bound, backend, bound.works)           # in a ScheduleRunner's place
    ...
    runner.run(call)
    group.close()

The first call waits until every rank is ready. Rank 0 is the calling process: it has the cache, and
decodes by itself. All read one copy of the weights. A rank that dies, fails, or keeps the others
waiting for longer than `seconds` ends the whole group with one error that names it, and everything
is to be opened again; a rank lost between calls is noticed by the next call before it begins. Not
safe for use from several threads.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from hmc import env
from hmc.closing import Closing
from hmc.errors import UsageError, WorkerError
from hmc.plan import Phase, Plan
from hmc.plan.file import canonical_json
from hmc.runtime.binding.memory import LentMemory
from hmc.runtime.binding.phase import BoundPhase
from hmc.runtime.device_ops.base import Work
from hmc.runtime.device_ops.link import Link
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.device_ops.traffic import Counts, LayerTraffic, table
from hmc.runtime.devices.base import Backend
from hmc.runtime.ranks.messages import Begin, Done, Join, Joined, Prefill, Ready, Setup
from hmc.runtime.ranks.process import Crew
from hmc.runtime.ranks.routing import Routing
from hmc.runtime.schedule.runner import Measured, ScheduleRunner
from hmc.runtime.weights.store import WeightStore

_T = TypeVar("_T")

_SECONDS = 60.0
_START_SECONDS = 600.0
"""Reading and pinning a large model takes minutes; a rank that fails or dies says so at once."""


class RankGroup(Closing):
    """The ranks of the phases that they share; this process is rank 0. A context manager."""

    def __init__(
        self,
        plan: Plan,
        count: int | None = None,
        devices: Literal["cuda", "host"] = "host",
        *,
        store: WeightStore,
        directory: Path | None,
        threads: int | None = None,
        seconds: float = _SECONDS,
        delays: int | None = None,
    ) -> None:
        """Start the processes of ranks 1.. for the phases of `plan` that several GPUs share.

        `count` is how many ranks are wanted (default: the plan's). They share `store`: an arena, or
        mapped shards of `directory`. `threads` are each rank's on the CPU, `seconds` how long one
        may keep the others waiting.

        Raises `UsageError` where the plan has no such phase, another number of ranks, more ranks
        than a token has experts, or weights that cannot be shared.
        """
        phases = _shared(plan, count, store)
        self.ranks = phases[0].ranks
        self.link = Link(0, self.ranks, seconds)
        self._seconds = seconds
        self._meeting = tempfile.mkdtemp(prefix="hmc-ranks-")
        self._place = torch.device("cpu")
        self._joined = False
        self._counts: list[Counts] = [Counter() for _ in range(self.ranks)]
        arena = store.arena
        setup = Setup(
            canonical_json(plan),
            None if directory is None else str(directory.absolute()),
            None if arena is None else arena.descriptor,
            tuple(phase.name for phase in phases),
            0,
            devices,
            threads or max(1, env.threads() // self.ranks),
            self._meeting,
            seconds,
            delays,
        )
        setups = [replace(setup, rank=rank) for rank in range(1, self.ranks)]
        try:
            self._crew = Crew(setups, [] if arena is None else [arena.descriptor], self.link.close)
        except BaseException:
            shutil.rmtree(self._meeting)
            raise
        self._end = weakref.finalize(self, _end, self._crew, self.link, self._meeting)

    def begin(self, memory: Mapping[int, LentMemory], place: torch.device) -> None:
        """Let the other ranks get ready; `memory` is by rank what rank 0's process has allocated
        for them, `place` where rank 0 computes."""
        self._place = place
        self._crew.tell(Begin(memory))

    def wait_ready(self) -> None:
        """Wait until all ranks can be called, once they have begun; raises why one cannot."""
        self._crew.check()
        if self._joined:
            return
        self._crew.collect(Ready, _START_SECONDS)
        self._crew.tell(Join())
        try:
            self.link.connect(Path(self._meeting) / "ranks", self._place)
        except WorkerError as error:
            self._crew.suspect(0, str(error))
            raise self._crew.settle() from error
        self._crew.collect(Joined, self._seconds)
        self._joined = True

    def traffic(self) -> tuple[LayerTraffic, ...]:
        """What each rank sent for each layer in all calls so far."""
        return table(self._counts)

    @property
    def pids(self) -> dict[int, int]:
        """The processes of ranks 1.."""
        return self._crew.pids

    def close(self) -> None:
        """End the processes, within seconds whatever they do; a second call does nothing."""
        self._end()


class GroupRunner:
    """Runs a call on all ranks; stands in a `ScheduleRunner`'s place."""

    def __init__(
        self,
        group: RankGroup,
        bound: BoundPhase,
        backend: Backend,
        works: Sequence[Work],
    ) -> None:
        """`bound` with the group's link; `works` are its own, or made of them."""
        self.group, self._bound = group, bound
        self._routing = Routing(bound, 0)
        self._runner = ScheduleRunner(bound.phase, backend, self._routing.counted(works))

    def run(self, call: Call) -> Measured:
        """As `ScheduleRunner.run`; times are those of rank 0. Raises `WorkerError` naming a rank
        that is gone or keeps the others waiting, and the error of one that failed."""
        return self._together(call, self._runner.run)

    def run_untimed(self, call: Call) -> None:
        """As `run`, unmeasured."""
        self._together(call, self._runner.run_untimed)

    def _together(self, call: Call, run: Callable[[Call], _T]) -> _T:
        group, crew = self.group, self.group._crew
        group.wait_ready()
        crew.tell(Prefill(self._bound.phase.name, call.ids, call.past))
        try:
            found = run(call)
        except BaseException as error:
            waited = group._place.type == "cuda" and isinstance(error, WorkerError)
            if group.link.failed or crew.trouble is not None or waited:
                crew.suspect(0, str(error))
                raise crew.settle() from error
            crew.lose(WorkerError("rank 0 failed, and every rank was ended: open them again"))
            raise
        done = crew.collect(Done, group._seconds)
        mine = group.link.take() + self._routing.take()
        for rank, counts in enumerate([mine, *(done[r].counts for r in sorted(done))]):
            group._counts[rank].update(counts)
        return found


def _shared(plan: Plan, count: int | None, store: WeightStore) -> list[Phase]:
    """The phases that GPUs share, or the `UsageError` of `RankGroup`."""
    shared = [phase for phase in plan.phases if phase.ranks > 1]
    if not shared:
        raise UsageError(
            f"the plan for {plan.machine.name} shares no prompt between GPUs: compile one for a"
            " machine with several"
        )
    phase = shared[0]  # all are shared by the same GPUs
    if count not in (None, phase.ranks):
        raise UsageError(
            f"{count} ranks are asked for, but the plan shares prompts between {phase.ranks} GPUs:"
            " compile one for a machine with as many GPUs as ranks"
        )
    if phase.ranks > plan.model.top_k:
        raise UsageError(
            f"{phase.ranks} ranks, but a token has {plan.model.top_k} experts: gathering every"
            " token on every rank pays with up to as many ranks; compile for fewer GPUs"
        )
    for each in shared:
        _check_exchanges(each)
    if store.arena is None and store.home != "mapped":
        raise UsageError(
            f"{store.home} weights in private memory cannot be shared with other ranks: open them"
            ' with home="shared" (--home shared)'
        )
    return shared


def _check_exchanges(phase: Phase) -> None:
    """Every rank has experts of every layer: its partial sums are one side of each exchange."""
    for step in phase.steps:
        if step.op == "exchange" and len(step.inputs) != phase.ranks:
            raise UsageError(
                f"layer {step.layer}: {phase.ranks} ranks, but experts for {len(step.inputs)} of"
                " them: compile for fewer GPUs"
            )


def _end(crew: Crew, link: Link, meeting: str) -> None:
    crew.end()
    link.close()
    shutil.rmtree(meeting, ignore_errors=True)
