"""Plans for the GPU check: as much of a GPU's memory is granted as makes a plan of the wanted kind;
hides budgets.

A GPU that holds a whole model streams nothing, so plans are made for a part of its memory (the
compile option `vram`). Two lanes and resident experts are to be measured whatever they gain: for
compiling alone, rates are assumed with which they always do. Predictions use what was probed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from hmc.compiler import compile as compile_plan
from hmc.errors import CapacityError
from hmc.machine.model import Machine, Rate
from hmc.plan import Phase, Plan
from hmc.plan.phases import STREAM
from hmc.ranges import expert_ranges
from hmc.runtime.phases.choice import on_devices

_STEPS = 8
"""Grants are found to the experts' bytes over this."""
_EAGER = "only to emit what is to be measured"
_ALWAYS = Rate(value=1e-3, kind="assumed", source=_EAGER)
_SLOW = Rate(value=1.0, kind="assumed", source=_EAGER)
_FAST = Rate(value=1e18, kind="assumed", source=_EAGER)


@dataclass(frozen=True)
class Model:
    """A model directory and how it is compiled: tokens of context and of a prefill chunk; `dummy`
    weights, or those of its shards."""

    directory: Path
    machine: Machine
    max_context: int
    max_chunk: int
    dummy: bool

    def host(self) -> Plan:
        """The plan for the CPU alone."""
        return self._compile(self.machine.model_copy(update={"gpus": ()}), 0.0, 0)

    def streamed(self, tokens: int, rings: Sequence[int] = (0,)) -> list[Plan]:
        """Plans with rings of so many experts (0: as many as pay) that stream a prompt of `tokens`,
        all for the same memory of the GPU: about the least in which the prompt takes one call
        and a layer's experts fit into the ring (or half of them, a quarter, ..), so that few are
        resident; where there is none, that in which a call takes the most tokens. A ring that does
        not fit is left out.

        Raises `CapacityError` where nothing streams.
        """
        vram = _room_to_stream(self, tokens)
        plans = [self.granted(vram, ring) for ring in rings]
        return [plan for plan in plans if plan is not None and STREAM in _names(plan)]

    def divided(self, *phases: str) -> Plan:
        """A plan with `phases` whose GPU holds about half of the experts, or as near to that as the
        budget's rules come, but not all; `CapacityError` where there is none. Where no prompt is to
        be streamed, hardly any memory is left for that."""
        found: list[Plan] = []
        ring = 0 if STREAM in phases else 2

        def enough(vram: float) -> bool:
            plan = self.granted(vram, ring)
            if plan is None:
                return False
            if set(phases) <= _names(plan):
                found.append(plan)
            return resident(plan) >= 0.5

        self.least(enough)
        if not found:
            raise CapacityError(
                f"{self.directory.name}: no part of the GPU's memory gives {', '.join(phases)}"
            )
        return min(found, key=lambda plan: abs(resident(plan) - 0.5))

    def least(self, enough: Callable[[float], bool]) -> float:
        """The least bytes of the GPU that are enough, to a part of the experts' size; more must
        always be enough, too."""
        low, high = 0.0, float(self.machine.gpus[0].memory_bytes)
        step = _expert_bytes(self.host()) / _STEPS
        while high - low > step:
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    def granted(self, vram: float, ring: int = 0) -> Plan | None:
        """The plan for so many bytes of the GPU; None where they do not hold the dense part."""
        try:
            plan = self._compile(_eager(self.machine), vram, ring)
        except CapacityError:
            return None
        if not any(on_devices(phase) for phase in plan.phases):
            return None
        return plan.model_copy(update={"machine": self.machine})

    def _compile(self, machine: Machine, vram: float, ring: int) -> Plan:
        return compile_plan(
            self.directory,
            machine=machine,
            max_context=self.max_context,
            max_chunk=self.max_chunk,
            dummy_weights=self.dummy,
            vram=vram / 1e9,
            ring=ring,
        )


@lru_cache(maxsize=8)
def _room_to_stream(model: Model, tokens: int) -> float:
    """Bytes of the GPU for `Model.streamed`."""
    tried: dict[float, Phase] = {}

    def enough(vram: float, ring: int) -> bool:
        plan = _granted(model, vram)
        if plan is None or STREAM not in _names(plan):
            return plan is not None and resident(plan) == 1.0
        phase = tried[vram] = plan.phase(STREAM)
        return phase.max_tokens >= tokens and phase.ring >= ring

    ring = model.host().model.experts
    while ring > 1:
        least = model.least(partial(enough, ring=ring))
        plan = _granted(model, least)
        if plan is not None and STREAM in _names(plan):
            return least
        ring //= 2
    if not tried:
        raise CapacityError(f"{model.directory.name}: no part of the GPU's memory lets it stream")
    return max(tried, key=lambda vram: tried[vram].max_tokens)


@lru_cache(maxsize=32)
def _granted(model: Model, vram: float) -> Plan | None:
    """`Model.granted`, kept while the least is sought for shorter and shorter rings."""
    return model.granted(vram)


def only(plan: Plan, *names: str) -> Plan:
    """The plan with these phases alone, so that no others take memory."""
    phases = tuple(phase for phase in plan.phases if phase.name in names)
    return plan.model_copy(update={"phases": phases, "switches": ()})


def resident(plan: Plan) -> float:
    """Share of the routed experts that are on the GPU."""
    hosted = sum(len(expert_ranges(each.tiers.get("host", ""))) for each in plan.placement)
    return 1 - hosted / (plan.model.experts * len(plan.placement))


def _names(plan: Plan) -> set[str]:
    return {phase.name for phase in plan.phases}


def _expert_bytes(plan: Plan) -> int:
    return sum(each.count * each.bytes for each in plan.experts)


def _eager(machine: Machine) -> Machine:
    """The machine with a slow CPU, and lanes and resident experts that cost next to nothing."""
    assert machine.rates is not None
    update = {"overlap": _ALWAYS, "memory": _FAST}
    gpus = tuple(
        gpu.model_copy(update={"rates": gpu.rates.model_copy(update=update)})
        for gpu in machine.gpus
        if gpu.rates is not None
    )
    rates = machine.rates.model_copy(update={"overlap": _ALWAYS, "record": _SLOW})
    return machine.model_copy(update={"gpus": gpus, "rates": rates})
