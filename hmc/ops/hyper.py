"""Hyper-connections (Xie et al., arXiv 2512.24880): several residual streams, of which layers read
one mixture, and which they mix anew when they write, or only add to (Hy4). A row holds the streams
side by side.
"""

from __future__ import annotations

from typing import Final

from hmc.codegen.spec import KernelSpec
from hmc.ops.row import (
    Attrs,
    Op,
    Role,
    Use,
    WeightRole,
    Weights,
    attr,
    one_kernel,
    picked,
    product,
    spec,
)

READ, WRITTEN, MIXED = 1, 2, 3
"""`parts` of a token's weights: n that n streams are read with; where a layer's result is added to
the streams, n that it is written with; where the streams are mixed besides, n x n for that.
"""


def weights_of(streams: int, parts: int) -> int:
    """Numbers a token."""
    return streams * (streams + 2 if parts == MIXED else parts)


def _weights_of(attrs: Attrs) -> int:
    return weights_of(int(attrs["streams"]), int(attrs["parts"]))


def _weights(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    return (spec("hyper_weights", use, picked(attrs, "streams", "parts", "iterations")),)


def _few(attrs: Attrs) -> bool:
    """Streams are lanes of a vector."""
    return int(attrs["streams"]) in (2, 4, 8)


def _possible(attrs: Attrs) -> bool:
    parts = int(attrs["parts"])
    return (
        _few(attrs)
        and READ <= parts <= MIXED
        and (int(attrs["iterations"]) > 0) == (parts == MIXED)
    )


def _out_possible(attrs: Attrs) -> bool:
    return _few(attrs) and WRITTEN <= int(attrs["parts"]) <= MIXED


_STREAMS = product("width", "streams")
_SIZES = {"width": int, "streams": int}

OPS: Final = (
    Op(
        # pre = sigmoid(a) + eps, post = magnitude sigmoid(b), where streams are not mixed + eps,
        # comb = softmax(c) + eps by rows, divided by the sums of columns and of rows (+ eps) in
        # turns; (a, b, c) = mixes * scale + base
        "hyper_weights",
        inputs=(Role("mixes", "f32", _weights_of),),
        outputs=(Role("y", "f32", _weights_of),),
        weights=(
            WeightRole("base", lambda a: (_weights_of(a),), vector=True),
            WeightRole("scale", lambda a: (int(a["parts"]),), vector=True),
        ),
        attrs={"streams": int, "parts": int, "iterations": int, "eps": float, "magnitude": float},
        possible=_possible,
        kernels=_weights,
        family="norms and sums",
    ),
    Op(
        # y = sum_j pre_j h_j
        "hyper_in",
        inputs=(Role("h", "f32", _STREAMS), Role("weights", "f32", _weights_of)),
        outputs=(Role("y", "f32", attr("width")),),
        attrs={**_SIZES, "parts": int},
        possible=_few,
        kernels=one_kernel("hyper_in", "width", "streams"),
        family="norms and sums",
    ),
    Op(
        # y_k = post_k x + sum_j comb_jk h_j, or + h_k where streams are not mixed
        "hyper_out",
        inputs=(
            Role("h", "f32", _STREAMS),
            Role("weights", "f32", _weights_of),
            Role("x", "f32", attr("width")),
        ),
        outputs=(Role("y", "f32", _STREAMS),),
        attrs={**_SIZES, "parts": int},
        possible=_out_possible,
        kernels=one_kernel("hyper_out", "width", "streams", "parts"),
        family="norms and sums",
    ),
    Op(
        # y_k = x
        "hyper_copy",
        inputs=(Role("x", "f32", attr("width")),),
        outputs=(Role("y", "f32", _STREAMS),),
        attrs=_SIZES,
        possible=_few,
        kernels=one_kernel("hyper_copy", "width", "streams"),
        family="norms and sums",
    ),
)
