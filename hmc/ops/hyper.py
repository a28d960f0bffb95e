"""Hyper-connections (Xie et al., arXiv 2512.24880): several residual streams, of which layers read
one mixture, and which they mix anew when they write. A row holds the streams side by side.
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


def weights_of(attrs: Attrs) -> int:
    """Numbers a token: of n streams n that are read with, and where the streams go on n that are
    written with and n x n that they are mixed by.
    """
    streams = int(attrs["streams"])
    return streams * (streams + 2) if int(attrs["iterations"]) else streams


def _scales(attrs: Attrs) -> tuple[int, ...]:
    return (3 if int(attrs["iterations"]) else 1,)


def _weights(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    return (spec("hyper_weights", use, picked(attrs, "streams", "iterations")),)


def _few(attrs: Attrs) -> bool:
    """Streams are lanes of a vector."""
    return int(attrs["streams"]) in (2, 4, 8)


_STREAMS = product("width", "streams")
_SIZES = {"width": int, "streams": int}

OPS: Final = (
    Op(
        # pre = sigmoid(a) + eps, post = 2 sigmoid(b), comb = softmax(c) + eps by rows, divided by
        # the sums of columns and of rows (+ eps) in turns; (a, b, c) = mixes * scale + base
        "hyper_weights",
        inputs=(Role("mixes", "f32", weights_of),),
        outputs=(Role("y", "f32", weights_of),),
        weights=(
            WeightRole("base", lambda a: (weights_of(a),), vector=True),
            WeightRole("scale", _scales, vector=True),
        ),
        attrs={"streams": int, "iterations": int, "eps": float},
        possible=_few,
        kernels=_weights,
        family="norms and sums",
    ),
    Op(
        # y = sum_j pre_j h_j
        "hyper_in",
        inputs=(Role("h", "f32", _STREAMS), Role("weights", "f32", weights_of)),
        outputs=(Role("y", "f32", attr("width")),),
        attrs={**_SIZES, "iterations": int},
        possible=_few,
        kernels=one_kernel("hyper_in", "width", "streams"),
        family="norms and sums",
    ),
    Op(
        # y_k = post_k x + sum_j comb_jk h_j
        "hyper_out",
        inputs=(
            Role("h", "f32", _STREAMS),
            Role("weights", "f32", lambda a: weights_of({**a, "iterations": 1})),
            Role("x", "f32", attr("width")),
        ),
        outputs=(Role("y", "f32", _STREAMS),),
        attrs=_SIZES,
        possible=_few,
        kernels=one_kernel("hyper_out", "width", "streams"),
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
