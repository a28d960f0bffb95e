"""Arithmetic of rows and vectors, element by element, as one expression (codegen/rowwise.py)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from hmc.codegen.rowwise import BF16_INPUTS, F32_INPUTS, WEIGHTS, Rowwise
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError, VerifyError
from hmc.ops.row import FLOATS, Attrs, Op, Role, Use, WeightRole, Weights, spec


def rowwise(attrs: Attrs) -> Rowwise:
    """The expression of a node or step; `VerifyError` where its attributes do not fit together."""
    sizes = {"width": int(attrs["width"]), "groups": int(attrs["groups"])}
    try:
        for word in str(attrs["columns"]).split():
            name, _, count = word.partition("=")
            sizes[name] = int(count)
        return Rowwise.given(str(attrs["expr"]), sizes)
    except (KernelError, ValueError) as error:
        raise VerifyError(f"pointwise: {error}") from error


def attributes(form: Rowwise, out: str) -> dict[str, int | str]:
    """The attributes that `rowwise` reads, and the result's dtype."""
    columns = " ".join(f"{name}={count}" for name, count in form.columns)
    return {
        "expr": str(form.tree),
        "width": form.width,
        "groups": form.groups,
        "columns": columns,
        "out": out,
    }


def _kernels(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    form = rowwise(attrs)
    return (spec("pointwise", use, form.sizes, out=str(attrs["out"]), expr=form.text),)


def _named(attrs: Attrs) -> Collection[str]:
    return rowwise(attrs).tree.leaves


def _columns(attrs: Attrs, name: str) -> int:
    """Columns of an operand; 0, which nothing has, where the expression does not name it."""
    return dict(rowwise(attrs).columns).get(name, 0)


def _input(name: str, dtype: str) -> Role:
    return Role(name, dtype, lambda attrs: _columns(attrs, name), optional=True)


def _vector(name: str) -> WeightRole:
    return WeightRole(name, lambda attrs: (_columns(attrs, name),), optional=True, vector=True)


OPS: Final = (
    Op(
        "pointwise",
        inputs=(
            *(_input(name, "f32") for name in F32_INPUTS),
            *(_input(name, "bf16") for name in BF16_INPUTS),
        ),
        outputs=(Role("y", "out", lambda attrs: rowwise(attrs).result),),
        weights=tuple(_vector(name) for name in WEIGHTS),
        attrs={"expr": str, "width": int, "groups": int, "columns": str, "out": str},
        possible=lambda attrs: rowwise(attrs).width > 0 and str(attrs["out"]) in FLOATS.split(),
        kernels=_kernels,
        named=_named,
        launches=lambda attrs, load: 3,  # an operation or two each
        family="norms and sums",
    ),
)
