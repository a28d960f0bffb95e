"""Whether a plan's phases need devices, and which may be asked for; hides that half of the runtime
computes with PyTorch, which takes longer to load than a plan for the CPU to answer.

Everything that a plan for CPUs runs does without: `device_half` is the one way there.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

from hmc.errors import UsageError
from hmc.plan import Phase, Plan

Devices = Literal["auto", "cuda", "host"]
"""Where steps on GPUs run: "cuda" on this machine's GPUs, "auto" likewise (its error says what else
there is), "host" on threads that play them."""


def on_devices(phase: Phase) -> bool:
    """Whether a phase computes on anything but the CPU."""
    return any(step.resource != "cpu" for step in phase.steps)


def device_half() -> Any:
    """runtime/phases/phase.py, loaded with everything behind it at the first call."""
    return importlib.import_module("hmc.runtime.phases.phase")


def check_gpus(plan: Plan, gpus: int, private: bool = False) -> None:
    """Refuse another number of GPUs, each driven by a process, than prompts are shared between, and
    several with `private` weights: `UsageError` saying what the plan is for, or what to do."""
    ranks = max(phase.ranks for phase in plan.phases)
    if gpus == ranks and plan.machine.gpus:
        if private and gpus > 1:
            raise UsageError(
                f"--gpus {gpus}: weights in private memory cannot be shared with other processes:"
                " give --home shared"
            )
        return
    if not plan.machine.gpus:
        found = "uses no GPU"
    elif ranks == 1:
        found = "gives every prompt to one GPU: give --gpus 1"
    else:
        found = f"shares prompts between {ranks} GPUs: give --gpus {ranks}"
    raise UsageError(
        f"--gpus {gpus}: the plan for {plan.machine.name} {found}, or compile one for a machine"
        f" with {max(gpus, 1)}"
    )
