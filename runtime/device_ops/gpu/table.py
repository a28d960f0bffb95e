"""What steps compute on a GPU by hmc's Triton kernels: the literal table `TRITON_OPS`, of the same
op functions as `DEVICE_OPS`, which are for the CPU that plays a GPU. No step asks the device for a
value.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from hmc.errors import MachineError
from hmc.plan import Step
from hmc.plan.memory import paged as names_paged
from hmc.runtime.device_ops import DEVICE_OPS, by_reference
from hmc.runtime.device_ops.base import OpFunction
from hmc.runtime.device_ops.gpu import attends, dense, paged, routed

LEAST_CAPABILITY = (8, 0)
"""Of the first cards that multiply in bf16."""

TRITON_OPS: dict[str, OpFunction] = {
    "norm": dense.norm,
    "add": dense.add,
    "add_norm": dense.add_norm,
    "linear": dense.linear,
    "gate_up": dense.gate_up,
    "rotary": dense.rotary,
    "attention": attends.attention,
    "mla": attends.mla,
    "route": routed.route,
    "sort": routed.sort,
    "experts": routed.experts,
}


@cache
def computes(device: torch.device) -> bool:
    """Whether kernels are made for a device: a GPU, of which `MachineError` says what it lacks; and
    not the CPU that plays one.
    """
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        raise MachineError("GPUs need Triton, which is not installed: pip install 'hmc[gpu]'")
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        raise MachineError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}:"
            f" hmc's kernels need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (Ampere) or later"
        )
    return True


PAGED_OPS: dict[str, OpFunction] = {"attention": paged.attention, "mla": paged.mla}
"""The same of the library of paged attention, for steps that name it."""


def device_op(step: Step, device: torch.device) -> OpFunction:
    """What computes a step on a device: on GPUs what it names, or hmc's Triton kernels, a function
    of PyTorch where it has something faster, else the op's reference.
    """
    ops = PAGED_OPS if names_paged(step) else TRITON_OPS
    own = ops.get(step.op) if computes(device) else None
    return own or DEVICE_OPS.get(step.op, by_reference)
