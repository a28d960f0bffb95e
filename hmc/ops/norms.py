"""Embedding, norms and sums: what lies between the matmuls."""

from __future__ import annotations

from typing import Final

from hmc.ops.row import FLOATS, Attrs, Load, Op, Role, WeightRole, Work, attr, one_kernel, product


def _width(attrs: Attrs) -> tuple[int, ...]:
    return (int(attrs["width"]),)


def _rows(attrs: Attrs, load: Load) -> Work:
    return Work(load.rows, 0.0)


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
        kernels=one_kernel("embed", "width", weight="table"),
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
        kernels=one_kernel("gather_rows", "width"),
        family="norms and sums",
    ),
    Op(
        "norm",
        inputs=(Role("x", "f32", product("width", "groups")),),
        outputs=(Role("y", "out", product("width", "groups")),),
        weights=(WeightRole("gamma", _width),),
        attrs={"width": int, "groups": int, "eps": float, "out": str},
        possible=lambda attrs: str(attrs["out"]) in FLOATS.split(),
        kernels=one_kernel("norm", "width", weight="gamma", out="out"),
        triton=True,
        family="norms and sums",
    ),
    Op(
        "add",
        inputs=_TERMS,
        outputs=(Role("y", "f32", attr("width")),),
        attrs={"width": int},
        kernels=one_kernel("add", "width"),
        triton=True,
        family="norms and sums",
    ),
    Op(
        "add_norm",
        inputs=_TERMS,
        outputs=(Role("h_out", "f32", attr("width")), Role("y", "bf16", attr("width"))),
        weights=(WeightRole("gamma", _width),),
        attrs={"width": int, "eps": float},
        kernels=one_kernel("add_norm", "width", weight="gamma", out="bf16"),
        triton=True,
        family="norms and sums",
    ),
)
