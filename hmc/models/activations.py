"""Activations of MLPs as configurations name them: expressions of `gate` and `up`."""

from __future__ import annotations

from typing import Final

from hmc.checkpoint.config import ModelConfig
from hmc.codegen.expr import Expr, apply, const, leaf, parse, substitute

ACTIVATIONS: Final = {
    **dict.fromkeys(("silu", "swish"), "silu(gate)"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu(gate)"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new"), "gelu_tanh(gate)"),
    "quick_gelu": "gate * sigmoid(1.702 * gate)",
    "relu": "relu(gate)",
    "relu2": "square(relu(gate))",
    "sigmoid": "sigmoid(gate)",
    "tanh": "tanh(gate)",
}
"""By the name in `hidden_act`, what the product of gate becomes before it multiplies that of up."""


def activation(config: ModelConfig) -> str:
    """The activation of a config's MLPs, from `hidden_act` or `hidden_activation`;
    `UnsupportedError` where it names none of `ACTIVATIONS`.
    """
    key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    name = config.get_str(key, "silu")
    if name not in ACTIVATIONS:
        raise config.unsupported(key, f"one of {', '.join(ACTIVATIONS)}")
    return gated(ACTIVATIONS[name])


def unary(config: ModelConfig, operand: str = "x", key: str = "hidden_act") -> str:
    """What `key` makes of one operand, as an expression of it: activations without a gate, which
    read up alone. `UnsupportedError` as `activation`.
    """
    name = config.get_str(key, "silu")
    if name not in ACTIVATIONS:
        raise config.unsupported(key, f"one of {', '.join(ACTIVATIONS)}")
    return str(substitute(parse(ACTIVATIONS[name]), {"gate": leaf(operand)}))


def gated(of_gate: str, *, limit: float = 0.0, after: bool = False, plus: float = 0.0) -> str:
    """`of_gate`, an expression of gate, times up + `plus`.

    A `limit` other than 0 bounds gate from above, `after` the activation or else before it, and up
    on both sides: gpt-oss is `gated("gate * sigmoid(1.702 * gate)", limit=7.0, plus=1.0)`,
    DeepSeek-V4 `gated("silu(gate)", limit=10.0)`, Step-3.5 the same `after` the activation.
    """
    gate, up = leaf("gate"), leaf("up")
    most, tree = const(limit), parse(of_gate)
    if limit:
        up = apply("minimum", apply("maximum", up, const(-limit)), most)
        tree = _least(tree, most) if after else substitute(tree, {"gate": _least(gate, most)})
    if plus:
        up = apply("add", up, const(plus))
    return str(apply("mul", tree, up))


def weighed(text: str) -> str:
    """An activation whose products are multiplied by the weight that a token's expert has, as where
    a family weighs what experts read and not what they give (Llama 4).
    """
    names = ("gate", "up")
    operands = {name: apply("mul", leaf(name), leaf("weight")) for name in names}
    return str(substitute(parse(text), operands))


def _least(tree: Expr, most: Expr) -> Expr:
    return apply("minimum", tree, most)
