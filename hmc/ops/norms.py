"""Embedding, norms and sums: what lies between the matmuls."""

from __future__ import annotations

from typing import Final

from hmc.codegen.spec import KernelSpec
from hmc.ops.row import (
    FLOATS,
    Attrs,
    Load,
    Op,
    Role,
    Use,
    WeightRole,
    Weights,
    Work,
    attr,
    picked,
    product,
    spec,
)


def _width(attrs: Attrs) -> tuple[int, ...]:
    return (int(attrs["width"]),)


def _embed(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    return (spec("embed", use, picked(attrs, "width"), weights["table"].format),)


def _rows(attrs: Attrs, load: Load) -> Work:
    return Work(load.rows, 0.0)


def _gather_rows(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    return (spec("gather_rows", use, picked(attrs, "width")),)


def _norm(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    out = str(attrs["out"])
    return (spec("norm", use, picked(attrs, "width"), weights["gamma"].format, out),)


def _add(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    return (spec("add", use, picked(attrs, "width")),)


def _add_norm(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    return (spec("add_norm", use, picked(attrs, "width"), weights["gamma"].format, "bf16"),)


_TERMS = (
    Role("h", "f32", attr("width")),
    Role("d0", "f32", attr("width")),
    Role("d1", "f32", attr("width"), optional=True),
)

OPS: Final = (
    Op(
        "embed",
        inputs=(Role("ids", "i32", lambda attrs: 1),),
        outputs=(Role("y", "f32", attr("width")),),
        weights=(WeightRole("table", lambda attrs: (int(attrs["vocab"]), int(attrs["width"]))),),
        attrs={"vocab": int, "width": int},
        kernels=_embed,
        work=_rows,  # a step holds one row's bytes
        where="host",  # a row a token is cheaper to copy than the table is to hold
        family="norms and sums",
    ),
    Op(
        "gather_rows",
        inputs=(
            Role("x", "f32", attr("width")),
            Role("rows", "i32", lambda attrs: 1, rows="wanted", given="rows"),
        ),
        outputs=(Role("y", "f32", attr("width"), rows="wanted"),),
        attrs={"width": int},
        kernels=_gather_rows,
        family="norms and sums",
    ),
    Op(
        "norm",
        inputs=(Role("x", "f32", product("width", "groups")),),
        outputs=(Role("y", "out", product("width", "groups")),),
        weights=(WeightRole("gamma", _width),),
        attrs={"width": int, "groups": int, "eps": float, "out": str},
        possible=lambda attrs: str(attrs["out"]) in FLOATS.split(),
        kernels=_norm,
        family="norms and sums",
    ),
    Op(
        "add",
        inputs=_TERMS,
        outputs=(Role("y", "f32", attr("width")),),
        attrs={"width": int},
        kernels=_add,
        family="norms and sums",
    ),
    Op(
        "add_norm",
        inputs=_TERMS,
        outputs=(Role("h_out", "f32", attr("width")), Role("y", "bf16", attr("width"))),
        weights=(WeightRole("gamma", _width),),
        attrs={"width": int, "eps": float},
        kernels=_add_norm,
        family="norms and sums",
    ),
)
