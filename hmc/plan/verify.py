"""Checks the meaning of a plan: what pydantic cannot see. A plan that passes cannot make a native
kernel read or write outside what it was given. Every broken rule raises `VerifyError` naming what
breaks it.

Rules follow from the rows of hmc/ops, each where its matter is:

    stored.py     weights: sizes and places
    steps.py      steps: attributes (about.py), weights by role, kernels
    operands.py   steps: operands and the rows of a call that they hold
    order.py      steps: events, buffers and slots in use
    values.py     steps: all phases compute the same
    placement.py  experts, cache, slots, resources, phases and limits
"""

from __future__ import annotations

from hmc.errors import VerifyError
from hmc.plan.about import named
from hmc.plan.model import SCHEMA_VERSION, Plan
from hmc.plan.operands import LOGITS, Walk
from hmc.plan.order import check_order
from hmc.plan.placement import Placement, check_constants, check_limits
from hmc.plan.steps import StepChecker
from hmc.plan.stored import check_weights
from hmc.plan.values import Values


def verify_plan(plan: Plan) -> None:
    """Raise `VerifyError` on the first rule that `plan` breaks."""
    if plan.schema_version != SCHEMA_VERSION:
        raise VerifyError(f"plan schema {plan.schema_version}, this hmc reads {SCHEMA_VERSION}")
    check_limits(plan)
    check_weights(plan)
    steps = StepChecker(plan)
    placement = Placement(plan)
    values = Values()
    for phase in plan.phases:
        walk = Walk(plan, phase)
        placement.begin(phase)
        values.begin()
        try:
            for position, step in enumerate(phase.steps):
                if step.id != position:
                    raise VerifyError(f"is number {position}")
                about = steps.about(step)
                walk.check(step, about)
                steps.check_weights(step, about)
                steps.check_kernels(phase, step, about)
                check_constants(plan, step, about)
                values.step(step, about)
                placement.step(step, about)
        except VerifyError as error:
            raise named(error, phase, step) from error
        walk.finish()
        values.finish(phase, LOGITS)
        placement.finish()
        check_order(phase)
