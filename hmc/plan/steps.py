"""Checks each step of a phase against the row of its op (hmc/ops): attributes (about.py); weights,
which are those of the row's roles, of their shape; routed experts are those of the step's layer;
and kernels, exactly those that the row chooses for its attributes, the stored form of its weights
and the size of its phase's calls, but for tile choices; on GPUs, whose kernels read its matrices.

A phase of prompts takes any number of tokens, one of decode `MAX_TOKENS` at most: its kernels are
made for so many.
"""

from __future__ import annotations

from dataclasses import replace

from hmc.codegen.isa import TIERS
from hmc.codegen.spec import MAX_TOKENS, tile_fault
from hmc.codegen.triton.layout import unread
from hmc.errors import UnsupportedError, VerifyError
from hmc.formats import format_of
from hmc.ops import SHARED_ATTRS, Op, Stored, Use
from hmc.ops.row import PAGED
from hmc.plan.about import About, about_of
from hmc.plan.memory import kind_of
from hmc.plan.model import ExpertWeights, Phase, Plan, Step
from hmc.plan.stored import stored_form

_SCHEDULED = {*SHARED_ATTRS, "range", "count", "screen"}
"""Attributes that say which part of a step's work is done."""


class StepChecker:
    """Checks steps of one plan."""

    def __init__(self, plan: Plan) -> None:
        """`VerifyError` where the plan's tier or a kernel's tile is none."""
        if plan.isa not in TIERS:
            raise VerifyError(f"unknown kernel tier {plan.isa}: known are {', '.join(TIERS)}")
        for key, kernel in plan.kernels.items():
            if fault := tile_fault(kernel.op, dict(kernel.tile)):
                raise VerifyError(f"kernel {key}: {fault}")
        self._plan = plan
        self._abouts: dict[tuple[object, ...], About] = {}
        self._models: dict[tuple[object, ...], int] = {}
        self._weights = {weight.name: weight for weight in plan.weights}
        forms: dict[Stored, Stored] = {}  # one object for all that are equal
        self._forms = {w.name: forms.setdefault(f := stored_form(w), f) for w in plan.weights}
        self._experts: dict[int, dict[str, ExpertWeights]] = {}
        for each in plan.experts:
            self._experts.setdefault(each.layer, {})[each.role] = each
        self._layers = {
            layer: {r: forms.setdefault(f := stored_form(w), f) for r, w in experts.items()}
            for layer, experts in self._experts.items()
        }
        self._known: set[tuple[object, ...]] = set()

    def about(self, step: Step) -> About:
        """What the row says of a step, whose attributes are known to be the row's."""
        attrs = step.attrs
        key = (
            *(step.op, step.resource == "cpu", step.kernels, *attrs),
            *(*attrs.values(), *map(type, attrs.values())),
        )
        found = self._abouts.get(key)
        if found is None:
            found = self._abouts[key] = about_of(self._plan, step, len(self._abouts))
            own = (step.op, *((k, v) for k, v in sorted(attrs.items()) if k not in _SCHEDULED))
            found.model = self._models.setdefault(own, len(self._models))
        return found

    def check_weights(self, step: Step, about: About) -> None:
        """`VerifyError` where a step's weights are not those of its row, of their shape."""
        row = about.row
        if row.loads:
            ranged = "range" in step.attrs
            if ranged and step.weights != {"experts": f"layer:{step.layer}"}:
                raise VerifyError("loads experts of another layer, or none")
            for each in step.weights.values():
                if each not in self._weights and not ranged:
                    raise VerifyError(f"it names weight {each}, which the plan does not hold")
            return
        if row.routed:
            layer = self._experts.get(step.layer)
            if layer is None or step.weights != {"experts": f"layer:{step.layer}"}:
                raise VerifyError("its weights are not the experts of its layer")
            for projection, shape in about.shapes.items():
                found, role = layer.get(projection), row.weight(projection)
                assert role is not None
                asked = not role.optional or projection in about.named
                if role.matmul and (found is not None) != asked:
                    has = "no" if found is None else "a"
                    raise VerifyError(f"its layer has {has} {projection}, against its activation")
                if found is None:
                    continue
                if role.vector and format_of(found.format).scales:
                    raise VerifyError(f"{projection} of its layer is stored in {found.format}")
                if found.shape != shape or found.count != step.attrs["experts"]:
                    raise VerifyError(
                        f"{projection} of its layer are {found.count} of {found.shape}, not"
                        f" {step.attrs['experts']} of {shape}"
                    )
            return
        known = 0
        for role in about.weights:
            name = step.weights.get(role.name)
            if name is None:
                if not role.optional or role.name in about.named:
                    raise VerifyError(f"it has no weight {role.name}")
                continue
            known += 1
            weight = self._weights.get(name)
            if weight is None:
                raise VerifyError(f"{role.name} names weight {name}, which the plan does not hold")
            if weight.shape != about.shapes[role.name]:
                raise VerifyError(
                    f"{role.name} {name} is {list(weight.shape)}, not"
                    f" {list(about.shapes[role.name])}"
                )
            if not role.matmul and format_of(weight.format).scales:
                raise VerifyError(f"{role.name} {name} is stored in {weight.format}")
        if known != len(step.weights):
            raise VerifyError(f"it has weights beside {', '.join(r.name for r in about.weights)}")

    def check_kernels(self, phase: Phase, step: Step, about: About) -> None:
        """`VerifyError` where a step has other kernels than its row chooses."""
        if not about.native:
            row, attrs = about.row, step.attrs
            made = [row.device_kernel(attrs)]
            paged = row.paged if kind_of(phase) == "decode" else None
            if paged is not None and not paged(attrs, step.weights):
                made.append(row.device_kernel(attrs, PAGED))
            if len(step.kernels) != 1 or step.kernels[0] not in made:
                raise VerifyError(f"a device computes it by {' or '.join(made)} alone")
            self._check_read(step, row)
            return
        if about.row.routed:
            stored = self._layers[step.layer]
        else:
            stored = {role: self._forms[name] for role, name in step.weights.items()}
        key = (about.number, phase.name, *stored, *map(id, stored.values()))
        if key not in self._known:
            self._compare(phase, step, about, stored)
            self._known.add(key)

    def _check_read(self, step: Step, row: Op) -> None:
        """`VerifyError` where kernels of GPUs cannot read a matrix of a step."""
        of_layer: dict[str, ExpertWeights] = self._experts[step.layer] if row.routed else {}
        for role in row.weights if row.triton else ():
            name = step.weights.get(role.name)
            found = of_layer.get(role.name) or (name and self._weights[name])
            if not found or not role.matmul:
                continue
            dtypes = tuple(plane.dtype for plane in found.planes)
            if why := unread(format_of(found.format), dtypes, found.group):
                raise VerifyError(why)

    def _compare(self, phase: Phase, step: Step, about: About, stored: dict[str, Stored]) -> None:
        tokens = 0 if phase.name.startswith("prefill") else MAX_TOKENS
        use = Use(self._plan.isa, tokens, self._plan.kv.block)
        try:
            chosen = about.row.kernels(step.attrs, stored, use)
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
