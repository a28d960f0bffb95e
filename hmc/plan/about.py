"""What the row of a step's op says of a step with these attributes (`About`): checks attributes,
works out what each operand must be. Looked at once for all steps that are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isfinite

from hmc.codegen.arguments import ARGS
from hmc.errors import VerifyError
from hmc.ops import OPS, SHARED_ATTRS, Op, Role, WeightRole
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
    attributes ask for although the row has them as optional; `weights` the roles, each of numbered
    ones that the attributes name; `strides` those that native kernels
    have, by name."""

    row: Op
    number: int
    model: int
    strides: frozenset[str] | None
    weights: tuple[WeightRole, ...]
    least: tuple[frozenset[str], frozenset[str]]
    named: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    known: dict[tuple[str, bool], Expected] = field(default_factory=dict)

    @property
    def native(self) -> bool:
        """Whether native kernels compute it."""
        return self.strides is not None

    def expected(self, step: Step, name: str, *, output: bool) -> Expected:
        """What the operand of a name must be; numbered ones are as their stem. Native kernels read
        and write the first of a role's dtypes.
        """
        if (name, output) not in self.known:
            role = role_named(self.row.outputs if output else self.row.inputs, name)
            if role is None:
                raise VerifyError(f"{name} is no {'output' if output else 'input'} of it")
            dtypes = role.dtypes(step.attrs)
            self.known[name, output] = Expected(
                role,
                dtypes if self.strides is None else dtypes[:1],
                None if role.width is None else role.width(step.attrs),
                # new cache rows are appended with a stride, or by an earlier layer's step
                self.strides is not None
                and role.rows != "all"
                and f"{role.name}_stride" not in self.strides,
            )
        return self.known[name, output]


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
    weights = tuple(each for role in row.weights for each in _numbered(role, named))
    specs = [plan.kernels[key] for key in step.kernels if key in plan.kernels]
    strides = frozenset(arg.name for spec in specs for arg in ARGS.get(spec.op, ()))
    return About(
        row,
        number,
        -1,
        strides if step.resource == "cpu" and row.native else None,
        weights,
        (_least(row.inputs) | (named & {role.name for role in row.inputs}), _least(row.outputs)),
        named,
        {role.name: role.shape(step.attrs) for role in weights},
    )


def _numbered(role: WeightRole, named: frozenset[str]) -> Iterator[WeightRole]:
    """The role, or those that a role of many stands for."""
    if not role.many:
        yield role
        return
    for name in sorted(named):
        if role_named((role,), name):
            yield replace(role, name=name, many=False)


def _least(roles: tuple[Role, ...]) -> frozenset[str]:
    return frozenset(
        role.name for role in roles if not (role.optional or role.many or role.name == "*")
    )
