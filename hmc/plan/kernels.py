"""Checks the kernels of steps: exactly those that the op's row chooses for its attributes, the
stored form of its weights and the size of its phase's calls, but for tile choices.

A phase of prompts takes any number of tokens, one of decode `MAX_TOKENS` at most: its kernels are
made for so many.
"""

from __future__ import annotations

from dataclasses import replace

from hmc.codegen.isa import TIERS
from hmc.codegen.spec import MAX_TOKENS, tile_fault
from hmc.errors import UnsupportedError, VerifyError
from hmc.ops import Stored, Use
from hmc.plan.about import About
from hmc.plan.model import Phase, Plan, Step
from hmc.plan.steps import StepChecker
from hmc.plan.stored import stored_form


def kernel_use(plan: Plan, phase: Phase) -> Use:
    """What the kernels of a phase are wanted for."""
    tokens = 0 if phase.name.startswith("prefill") else MAX_TOKENS
    return Use(plan.isa, tokens, plan.kv.block)


class KernelChecker:
    """Checks the kernels of steps that a `StepChecker` has passed."""

    def __init__(self, plan: Plan, steps: StepChecker) -> None:
        """`VerifyError` where the plan's tier or a kernel's tile is none."""
        if plan.isa not in TIERS:
            raise VerifyError(f"unknown kernel tier {plan.isa}: known are {', '.join(TIERS)}")
        for key, kernel in plan.kernels.items():
            if fault := tile_fault(kernel.op, dict(kernel.tile)):
                raise VerifyError(f"kernel {key}: {fault}")
        self._plan, self._steps = plan, steps
        self._numbers: dict[Stored, int] = {}
        self._forms = {weight.name: self._number(stored_form(weight)) for weight in plan.weights}
        self._layers: dict[int, tuple[int, ...]] = {}
        for each in plan.experts:
            form = self._number(stored_form(each))
            self._layers[each.layer] = (*self._layers.get(each.layer, ()), form)
        self._known: set[tuple[object, ...]] = set()

    def check(self, phase: Phase, step: Step, about: About) -> None:
        """Raise `VerifyError` where a step has other kernels than its row chooses."""
        if not about.native:
            only = about.row.torch_kernel
            if step.kernels != (only,):
                raise VerifyError(f"PyTorch computes it by {only} alone")
            return
        if about.row.routed:
            forms = self._layers[step.layer]
        else:
            forms = tuple(self._forms[name] for name in step.weights.values())
        key = (about.number, phase.name, forms, *step.weights)
        if key not in self._known:
            self._compare(phase, step, about)
            self._known.add(key)

    def _number(self, form: Stored) -> int:
        return self._numbers.setdefault(form, len(self._numbers))

    def _compare(self, phase: Phase, step: Step, about: About) -> None:
        stored = {
            role: stored_form(weight)
            for role, weight in self._steps.weights_of(step, about).items()
        }
        try:
            chosen = about.row.kernels(step.attrs, stored, kernel_use(self._plan, phase))
        except UnsupportedError as error:
            raise VerifyError(str(error)) from error
        if len(chosen) != len(step.kernels):
            raise VerifyError(f"it has {len(step.kernels)} kernels, not {len(chosen)}")
        for key, spec in zip(step.kernels, chosen, strict=True):
            found = self._plan.kernels.get(key)
            if found is None:
                raise VerifyError(f"kernel {key} is not in the plan")
            if replace(found, tile=()) != spec:
                sizes = ", ".join(f"{name} {value}" for name, value in spec.params)
                raise VerifyError(
                    f"kernel {key} is not {spec.op} of {spec.weight or '-'}"
                    f" in {spec.out} for {spec.isa} with {sizes} {spec.expr}"
                )
