"""Checks each step of a phase against the row of its op (hmc/ops): attributes (about.py) and
weights, which are those of the row's roles, of their shape; routed experts are those of the step's
layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from hmc.errors import VerifyError
from hmc.ops import SHARED_ATTRS
from hmc.plan.about import About, about_of
from hmc.plan.model import ExpertWeights, Plan, Step, Weight
from hmc.plan.stored import is_plain

_SCHEDULED = {*SHARED_ATTRS, "range", "count"}
"""Attributes that say which part of a step's work is done."""


class StepChecker:
    """Checks steps of one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._abouts: dict[tuple[object, ...], About] = {}
        self._models: dict[tuple[object, ...], int] = {}
        self._weights = {weight.name: weight for weight in plan.weights}
        self._experts: dict[int, dict[str, ExpertWeights]] = {}
        for each in plan.experts:
            self._experts.setdefault(each.layer, {})[each.role] = each

    def weights_of(self, step: Step, about: About) -> Mapping[str, Weight | ExpertWeights]:
        """What a step's weight roles stand for."""
        if about.row.routed:
            return self._experts[step.layer]
        return {role: self._weights[name] for role, name in step.weights.items()}

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
                found = layer[projection]
                if found.shape != shape or found.count != step.attrs["experts"]:
                    raise VerifyError(
                        f"{projection} of its layer are {found.count} of {found.shape}, not"
                        f" {step.attrs['experts']} of {shape}"
                    )
            return
        known = 0
        for role in row.weights:
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
            if not role.matmul and not is_plain(weight):
                raise VerifyError(f"{role.name} {name} is stored in {weight.format}")
        if known != len(step.weights):
            raise VerifyError(f"it has weights beside {', '.join(r.name for r in row.weights)}")
