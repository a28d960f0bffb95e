"""The plan: what crosses from compiler to runtime, its file and its rules.

model.py    the records, as frozen pydantic models
file.py     the .hmp container
verify.py   the rules of meaning, checked on save and on load; each in the file of its matter:
            stored, about, steps, operands, values, order, placement
memory.py   what a plan takes of each GPU
phases.py   which phase serves a call
diff.py     two plans compared
"""

from __future__ import annotations

import os

from hmc.plan import file
from hmc.plan.base import DTYPE_BYTES, DType, Frozen
from hmc.plan.model import (
    Buffer,
    CheckpointInfo,
    Decision,
    ExpertPlane,
    ExpertWeights,
    Goals,
    LayerPlacement,
    LedgerItem,
    Limits,
    ModelInfo,
    Operand,
    Phase,
    Plan,
    Slot,
    Step,
    StoredPart,
    StoredPick,
    StoredPlane,
    Switch,
    Weight,
)
from hmc.plan.states import KVLayout, StateGroup, Stop, state_groups
from hmc.plan.verify import verify_plan

__all__ = [
    "DTYPE_BYTES",
    "Buffer",
    "CheckpointInfo",
    "DType",
    "Decision",
    "ExpertPlane",
    "ExpertWeights",
    "Frozen",
    "Goals",
    "KVLayout",
    "LayerPlacement",
    "LedgerItem",
    "Limits",
    "ModelInfo",
    "Operand",
    "Phase",
    "Plan",
    "Slot",
    "StateGroup",
    "Step",
    "Stop",
    "StoredPart",
    "StoredPick",
    "StoredPlane",
    "Switch",
    "Weight",
    "load_plan",
    "save_plan",
    "state_groups",
    "verify_plan",
]


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Verify `plan` and write it to `path` (.hmp), whole or not at all; `PlanError` when it cannot
    be written, `VerifyError` when it breaks a rule.
    """
    verify_plan(plan)
    file.save(plan, path)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and verify a plan; `PlanFormatError` names what is wrong with the file, `VerifyError`
    the rule that its content breaks.
    """
    plan = file.load(path)
    verify_plan(plan)
    return plan
