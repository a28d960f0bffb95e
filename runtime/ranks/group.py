"""Several GPUs on one prompt, each driven by a process of its own (a *rank*); hides the processes,
how they meet, and how they end.

    group = RankGroup(plan, "cuda", store=store, directory=directory, threads=8)  # starts ranks 1..
    binding = Binding(parts, backend.devices, link=group.link)                     # rank 0 is here
    group.begin(binding.lend(), place)            # the others use the memory that it has for them
    runner = GroupRunner(group, bound, backend, bound.works)           # in a ScheduleRunner's place
    ...
    runner.run(call)
    group.close()

Rank 0 is the calling process: it has the cache, and decodes by itself. All read one copy of the
weights. A rank that dies, fails, or keeps the others waiting for longer than `seconds` ends the
whole group with one error that names it, and everything is to be opened again; a rank lost between
calls is noticed by the next call before it begins. Not safe for use from several threads.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch

from hmc.closing import Closing
from hmc.errors import UsageError, WorkerError
from hmc.plan import Phase, Plan
from hmc.runtime.binding.memory import LentMemory
from hmc.runtime.binding.phase import BoundPhase
from hmc.runtime.device_ops.base import Work
from hmc.runtime.device_ops.link import Link
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.devices.base import Backend
from hmc.runtime.ranks.messages import Begin, Join, Prefill, Setup
from hmc.runtime.ranks.process import Crew
from hmc.runtime.schedule.runner import Measured, ScheduleRunner
from hmc.runtime.weights.store import Shared, WeightStore

_T = TypeVar("_T")

_SECONDS = 60.0
_START_SECONDS = 600.0
"""Reading and pinning a large model takes minutes; a rank that fails or dies says so at once."""


class RankGroup(Closing):
    """The ranks of the phases that they share; this process is rank 0. A context manager."""

    def __init__(
        self,
        plan: Plan,
        devices: Literal["cuda", "host"],
        *,
        store: WeightStore,
        directory: Path | None,
        threads: int,
        seconds: float = _SECONDS,
        delays: int | None = None,
    ) -> None:
        """Start the processes of ranks 1.. for the phases of `plan` that several GPUs share.

        They share `store`: an arena, or mapped shards of `directory`. `threads` are each rank's on
        the CPU, `seconds` how long one may keep the others waiting.

        Raises `UsageError` where there are more ranks than a token has experts, or weights that
        cannot be shared.
        """
        phases, weights = _shared(plan), Shared.of(plan, store, directory)
        ranks = phases[0].ranks
        self.link = Link(0, ranks, seconds)
        self.seconds = seconds
        self.place = torch.device("cpu")
        meeting = tempfile.mkdtemp(prefix="hmc-ranks-")
        self._meeting = f"{meeting}/ranks"
        names = tuple(phase.name for phase in phases)
        setups = [
            Setup(weights, names, rank, devices, threads, self._meeting, seconds, delays)
            for rank in range(1, ranks)
        ]
        try:
            self.crew = Crew(setups, weights.descriptors, self.link.close)
        except BaseException:
            shutil.rmtree(meeting)
            raise
        self._end = weakref.finalize(self, _end, self.crew, self.link, meeting)

    def begin(self, memory: Mapping[int, LentMemory], place: torch.device) -> None:
        """Wait until all ranks can be called; `memory` is by rank what rank 0's process has
        allocated for them, `place` where rank 0 computes. Raises why one cannot begin."""
        self.place = place
        self.crew.tell(Begin(memory))
        self.crew.collect(_START_SECONDS)
        self.crew.tell(Join())
        try:
            self.link.connect(Path(self._meeting), place)
        except WorkerError as error:
            self.crew.suspect(0, str(error))
            raise self.crew.settle() from error
        self.crew.collect(self.seconds)

    @property
    def pids(self) -> dict[int, int]:
        """The processes of ranks 1.."""
        return self.crew.pids

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
        self._runner = ScheduleRunner(bound.phase, backend, works)

    def run(self, call: Call) -> Measured:
        """As `ScheduleRunner.run`; times are those of rank 0. Raises `WorkerError` naming a rank
        that is gone or keeps the others waiting, and the error of one that failed."""
        return self._together(call, self._runner.run)

    def run_untimed(self, call: Call) -> None:
        """As `run`, unmeasured."""
        self._together(call, self._runner.run_untimed)

    def _together(self, call: Call, run: Callable[[Call], _T]) -> _T:
        group, crew = self.group, self.group.crew
        crew.tell(Prefill(self._bound.phase.name, call.ids, call.past))
        try:
            found = run(call)
        except BaseException as error:
            waited = group.place.type == "cuda" and isinstance(error, WorkerError)
            if group.link.failed or crew.trouble is not None or waited:
                crew.suspect(0, str(error))
                raise crew.settle() from error
            crew.lose(WorkerError("rank 0 failed, and every rank was ended: open them again"))
            raise
        crew.collect(group.seconds)
        return found


def _shared(plan: Plan) -> list[Phase]:
    """The phases that GPUs share, all the same ones, or the `UsageError` of `RankGroup`."""
    shared = [phase for phase in plan.phases if phase.ranks > 1]
    for phase in shared:
        if phase.ranks > plan.model.top_k:
            raise UsageError(
                f"{phase.ranks} ranks, but a token has {plan.model.top_k} experts: gathering every"
                " token on every rank pays with up to as many ranks; compile for fewer GPUs"
            )
        for step in phase.steps:  # every rank's partial sums are one side of each exchange
            if step.op == "exchange" and len(step.inputs) != phase.ranks:
                raise UsageError(
                    f"layer {step.layer}: {phase.ranks} ranks, but experts for {len(step.inputs)}"
                    " of them: compile for fewer GPUs"
                )
    return shared


def _end(crew: Crew, link: Link, meeting: str) -> None:
    crew.end()
    link.close()
    shutil.rmtree(meeting, ignore_errors=True)
