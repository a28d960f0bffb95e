"""Matmuls: one matrix, gate and up of a gated MLP, the routed experts, with a gate or without.

Decode kernels take up to 16 tokens and read every weight once; those of prefill take any number, in
tiles.
"""

from __future__ import annotations

import math
from typing import Final

from hmc.codegen.expr import GATED, ROUTED, activation, has_gate
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError, UnsupportedError, VerifyError
from hmc.ops.row import (
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
from hmc.ops.screen import GROUP, screen_kernels


def _linear(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    stored = weights["weight"]
    sizes = {"k": int(attrs["k"]), **stored.sizes}
    if use.many:
        return (spec("gemm", use, sizes, stored.format),)
    if "screen" in attrs:
        return screen_kernels(attrs, weights, use)
    return (spec("linear", use, {**sizes, "tokens": use.tokens}, stored.format),)


def _grouped_linear(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    stored = {*weights.values()}
    if len(stored) != 1 or len(weights) != int(attrs["groups"]):
        raise UnsupportedError("the matrices of a grouped linear layer are not one a group alike")
    return _linear(attrs, {"weight": stored.pop()}, use)


def _activated(attrs: Attrs, operands: tuple[str, ...] = GATED) -> bool:
    """Whether `act` is an expression of `operands`; `VerifyError` says what of it is not."""
    try:
        return bool(activation(str(attrs["act"]), operands).leaves)
    except KernelError as error:
        raise VerifyError(str(error)) from error


def _biased(weights: Weights, *roles: str) -> dict[str, int]:
    """A kernel's size where there are biases: of all `roles`, or of none."""
    found = [role in weights for role in roles]
    if any(found) != all(found):
        raise UnsupportedError(f"of {', '.join(roles)} some have a bias and some have none")
    return {"biased": 1} if any(found) else {}


def _gate_up(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    stored = weights["gate"]
    sizes, act = {"k": int(attrs["k"]), **stored.sizes}, str(attrs["act"])
    sizes |= _biased(weights, "gate_bias", "up_bias")
    if use.many:
        # the many-token form is that of experts: here one, which all tokens go to
        one = {"experts": 1, "top_k": 1, "n": int(attrs["n"])}
        return (spec("grouped_gate_up", use, sizes | one, stored.format, "bf16", act),)
    return (spec("gate_up", use, {**sizes, "tokens": use.tokens}, stored.format, "bf16", act),)


def _experts(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    stored, down = weights["up"], weights["down"]
    if weights.get("gate", stored) != stored:
        raise UnsupportedError("gate and up of the experts differ in format")
    sizes = picked(attrs, "experts", "top_k")
    sizes |= _biased(weights, *(f"{role}_bias" for role in _MATRICES if role in weights))
    into = {"k": int(attrs["k"]), "n": int(attrs["n"]), **sizes, **stored.sizes}
    back = {"k": int(attrs["n"]), "n": int(attrs["k"]), **sizes, **down.sizes}
    names = ("grouped_gate_up", "grouped_down") if use.many else ("experts_gate_up", "experts_down")
    few = {} if use.many else {"tokens": use.tokens}
    return (
        spec(names[0], use, into | few, stored.format, "bf16", str(attrs["act"])),
        spec(names[1], use, back | few, down.format, "f32"),
    )


_MATRICES = ("gate", "up", "down")


def _read(attrs: Attrs) -> tuple[str, ...]:
    """What experts read beside weights that they have anyway: without a gate no such matrix."""
    return ("x", "ids", "routing", *(["gate"] if has_gate(str(attrs["act"])) else []))


def distinct_experts(experts: int, top_k: int, tokens: float, here: int | None = None) -> float:
    """Expected number of distinct experts that `tokens` tokens choose among `here` of `experts`.

    With even, independent routing a token misses a given expert with probability 1 - k/E, so b
    tokens all miss it with (1 - k/E)^b; the expectation of a sum is the sum of expectations:
    here * (1 - (1 - k/E)^b). For E = 256, k = 8: 8, 15.75, 23.3 for 1, 2, 3 tokens.
    """
    count = experts if here is None else here
    return float(count * (1 - (1 - top_k / experts) ** tokens))


def chosen_experts(attrs: Attrs, tokens: float) -> float:
    """`distinct_experts` of those that a step has."""
    experts = int(attrs["experts"])
    return distinct_experts(experts, int(attrs["top_k"]), tokens, int(attrs.get("count", experts)))


def _experts_work(attrs: Attrs, load: Load) -> Work:
    """A step holds the weights of `top_k` experts. Rows are read in bf16, gate x up goes out and
    in, and down is added to f32 sums.
    """
    distinct, experts = chosen_experts(attrs, load.tokens), int(attrs["experts"])
    top_k, hidden, inner = int(attrs["top_k"]), int(attrs["k"]), int(attrs["n"])
    routed = load.tokens * top_k * int(attrs.get("count", experts)) / experts
    moved = routed * (2 * hidden + 4 * inner + 8 * hidden)
    return Work(distinct / top_k, routed / top_k, moved=moved, pieces=distinct)


ACTIVATED_BYTES = 1 << 27
"""Bytes of activations between the experts' matmuls that a GPU holds at once."""


def _experts_launches(attrs: Attrs, load: Load) -> int:
    """Two matmuls; of many tokens for some at a time, which are found first."""
    if load.few:
        return 2
    held = 2.0 * load.tokens * int(attrs["top_k"]) * int(attrs["n"])
    return 2 + 2 * max(1, math.ceil(held / ACTIVATED_BYTES))


def _matrix(attrs: Attrs) -> tuple[int, ...]:
    return int(attrs["n"]), int(attrs["k"])


def _back(attrs: Attrs) -> tuple[int, ...]:
    return int(attrs["k"]), int(attrs["n"])


def _bias(name: str, size: str, *, expert: bool = False) -> WeightRole:
    return WeightRole(
        name, lambda attrs: (int(attrs[size]),), optional=True, expert=expert, vector=True
    )


OPS: Final = (
    Op(
        "linear",
        inputs=(Role("x", "bf16", attr("k")),),
        outputs=(Role("y", "f32", attr("n")),),
        weights=(
            WeightRole("weight", _matrix, matmul=True),
            _bias("bias", "n"),
        ),
        attrs={"k": int, "n": int},
        extra={"router": int, "screen": int},
        possible=lambda attrs: attrs.get("screen", GROUP) == GROUP,
        kernels=_linear,
        triton=True,
        family="dense matmuls",
    ),
    Op(
        # y = (x_0 W_0^T, x_1 W_1^T, ...): a matrix for each of the equal parts of a row
        "grouped_linear",
        inputs=(Role("x", "bf16", product("groups", "k")),),
        outputs=(Role("y", "f32", product("groups", "n")),),
        weights=(WeightRole("weight", _matrix, matmul=True, many=True),),
        attrs={"groups": int, "k": int, "n": int},
        possible=lambda attrs: min(picked(attrs, "groups", "k", "n").values()) > 0,
        kernels=_grouped_linear,
        named=lambda attrs: ("x", *(f"weight{n}" for n in range(int(attrs["groups"])))),
        family="dense matmuls",
    ),
    Op(
        "gate_up",
        inputs=(Role("x", "bf16", attr("k")),),
        outputs=(Role("y", "bf16", attr("n")),),
        weights=(
            WeightRole("gate", _matrix, matmul=True),
            WeightRole("up", _matrix, matmul=True),
            _bias("gate_bias", "n"),
            _bias("up_bias", "n"),
        ),
        attrs={"k": int, "n": int, "act": str},
        possible=_activated,
        kernels=_gate_up,
        triton=True,
        family="dense matmuls",
    ),
    Op(
        "experts",
        inputs=(
            Role("x", "bf16", attr("k")),
            Role("ids", "i32", attr("top_k")),
            Role("routing", "f32", attr("top_k")),
            Role("order", "i32", attr("top_k"), optional=True),
        ),
        outputs=(Role("y", "f32", attr("k")),),
        weights=(
            WeightRole("gate", _matrix, optional=True, expert=True, matmul=True),
            WeightRole("up", _matrix, expert=True, matmul=True),
            WeightRole("down", _back, expert=True, matmul=True),
            _bias("gate_bias", "n", expert=True),
            _bias("up_bias", "n", expert=True),
            _bias("down_bias", "k", expert=True),
        ),
        attrs={"k": int, "n": int, "experts": int, "top_k": int, "act": str},
        extra={"range": str, "count": int},
        possible=lambda attrs: (
            int(attrs["top_k"]) <= int(attrs["experts"]) and _activated(attrs, ROUTED)
        ),
        kernels=_experts,
        named=_read,
        work=_experts_work,
        launches=_experts_launches,
        triton=True,
        family="experts",
    ),
)
