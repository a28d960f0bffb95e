"""What the row of a step's op says of a step with these attributes (`About`): checks attributes,
works out what each operand must be. Looked at once for all steps that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from hmc.codegen.spec import ARGS
from hmc.errors import VerifyError
from hmc.ops import OPS, SHARED_ATTRS, Op, Role
from hmc.ops.row import role_named
from hmc.plan.model import Phase, Plan, Step

_MOST = 1 << 31
"""Sizes are below it: positions and ids are i32."""


@dataclass(frozen=True)
class Expected:
    """What an operand of a role must be; `packed`: no stride goes with it."""

    role: Role
    dtypes: tuple[str, ...]
    width: int | None
    packed: bool = False


@dataclass
class About:
    """What is the same for all steps of an op with the same attributes and kernels; `model` is the
    same for those that differ in nothing but what a schedule adds; `named` are operands that the
    attributes ask for although the row has them as optional."""

    row: Op
    number: int
    model: int
    native: bool
    inputs: dict[str, Expected]
    outputs: dict[str, Expected]
    least: tuple[frozenset[str], frozenset[str]]
    named: frozenset[str]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def expected(self, step: Step, name: str, *, output: bool) -> Expected:
        """What the operand of a name must be; numbered ones are as their stem."""
        known = self.outputs if output else self.inputs
        if name not in known:
            role = role_named(self.row.outputs if output else self.row.inputs, name)
            if role is None:
                raise VerifyError(f"{name} is no {'output' if output else 'input'} of it")
            known[name] = _expected(role, step, None)
        return known[name]


def named(error: VerifyError, phase: Phase, step: Step) -> VerifyError:
    """What is wrong with a step, and which one that is."""
    return VerifyError(f"phase {phase.name}, step {step.id} ({step.op}): {error}")


def about_of(plan: Plan, step: Step, number: int) -> About:
    """The row of a step, once its attributes are known to be the row's."""
    row = OPS.get(step.op)
    if row is None:
        raise VerifyError(f"unknown op: known are {', '.join(sorted(OPS))}")
    allowed = {**row.attrs, **row.extra, **SHARED_ATTRS}
    if missing := row.attrs.keys() - step.attrs.keys():
        raise VerifyError(f"it has no attribute {min(missing)}")
    for name, value in step.attrs.items():
        if name not in allowed:
            raise VerifyError(f"unknown attribute {name}")
        if type(value) is not allowed[name]:
            raise VerifyError(f"attribute {name} is {value!r}, no {allowed[name].__name__}")
        if isinstance(value, int | float) and not (isfinite(value) and 0 <= value < _MOST):
            raise VerifyError(f"attribute {name} is {value}")
    for name in ("vocab", "experts", "top_k"):
        if name in step.attrs and step.attrs[name] != getattr(plan.model, name):
            raise VerifyError(f"attribute {name} is not the model's {getattr(plan.model, name)}")
    if not row.possible(step.attrs):
        raise VerifyError("its attributes fit no kernel")
    named = frozenset(() if row.named is None else row.named(step.attrs))
    native = step.resource == "cpu" and row.native
    specs = [plan.kernels[key] for key in step.kernels if key in plan.kernels]
    names = frozenset(arg.name for spec in specs for arg in ARGS.get(spec.op, ()))
    strides = names if native else None
    return About(
        row,
        number,
        -1,
        native,
        _expectations(row.inputs, step, strides),
        _expectations(row.outputs, step, strides),
        (_least(row.inputs) | (named & {role.name for role in row.inputs}), _least(row.outputs)),
        named,
        {role.name: role.shape(step.attrs) for role in row.weights},
    )


def _least(roles: tuple[Role, ...]) -> frozenset[str]:
    return frozenset(
        role.name for role in roles if not (role.optional or role.many or role.name == "*")
    )


def _expectations(
    roles: tuple[Role, ...], step: Step, strides: frozenset[str] | None
) -> dict[str, Expected]:
    return {role.name: _expected(role, step, strides) for role in roles if not role.many}


def _expected(role: Role, step: Step, strides: frozenset[str] | None) -> Expected:
    """What an operand must be; native kernels have `strides` by these names, and read the first of
    a role's dtypes."""
    dtypes = role.dtypes(step.attrs)
    return Expected(
        role,
        dtypes if strides is None else dtypes[:1],
        None if role.width is None else role.width(step.attrs),
        strides is not None and f"{role.name}_stride" not in strides,
    )
