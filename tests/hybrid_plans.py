"""Plans for machines with GPUs, compiled once a session: real widths, few layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from hmc.compiler import compile as compile_plan
from hmc.machine.detect import load_machine
from hmc.machine.model import Machine, Rate
from hmc.plan import Phase, Plan, Step

ONE, TWO = "epyc9355-rtx5090", "epyc9355-rtx5090x2"
CONFIGS = Path(__file__).parent.parent / "examples" / "configs"


@lru_cache(maxsize=16)
def plan_for(model: str, machine: str, layers: int = 6, **options: float) -> Plan:
    """The plan of a bundled configuration, cut to `layers`, for a named machine."""
    return compile_plan(
        CONFIGS / model,
        machine=machine,
        dummy_weights=True,
        layers=layers,
        **options,  # type: ignore[arg-type]
    )


def with_memory(machine: Machine, size: int) -> Machine:
    """The machine with `size` bytes on each GPU."""
    gpus = tuple(gpu.model_copy(update={"memory_bytes": size}) for gpu in machine.gpus)
    return machine.model_copy(update={"gpus": gpus})


def with_rate(machine: Machine, **values: float) -> Machine:
    """The machine with other CPU-side rates."""
    assert machine.rates is not None
    rates = {
        name: Rate(value=value, kind="assumed", source="test") for name, value in values.items()
    }
    return machine.model_copy(update={"rates": machine.rates.model_copy(update=rates)})


def named(name: str) -> Machine:
    """A named machine."""
    return load_machine(name)


def with_phase(plan: Plan, name: str, change: Callable[[Phase], Phase]) -> Plan:
    """The plan with one phase changed."""
    phases = tuple(change(each) if each.name == name else each for each in plan.phases)
    return plan.model_copy(update={"phases": phases})


def waits_of(phase: Phase) -> list[tuple[int, int]]:
    """Every (position of a step, event it waits for)."""
    return [(at, event) for at, step in enumerate(phase.steps) for event in step.waits]


def without_wait(phase: Phase, at: int, event: int) -> Phase:
    """The phase with one wait dropped."""
    steps = list(phase.steps)
    step: Step = steps[at]
    kept = tuple(each for each in step.waits if each != event)
    steps[at] = step.model_copy(update={"waits": kept})
    return phase.model_copy(update={"steps": tuple(steps)})
