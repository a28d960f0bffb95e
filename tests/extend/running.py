"""An op with a state a sequence, added to hmc from outside: a running average of what each column
was, y_t = decay * y_(t-1) + x_t. And a small family that has it, whose layers keep unlike states.

Everything that hmc has to be told of it: the row, the block with its reference, a kernel with its
arguments, and how the kernel is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hmc.blocks import Block, Linear, RMSNorm
from hmc.blocks.reference import REFERENCES, Tensors
from hmc.checkpoint.config import ModelConfig
from hmc.codegen.arguments import ARGS, Arg
from hmc.codegen.ir import F32, I32, I64, Emitter, Value, const
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.spec import KernelSpec
from hmc.graph import Attr, attrs
from hmc.models import FAMILIES, Family
from hmc.models.common import CausalLM, GroupedQueryAttention, norm_eps
from hmc.models.rope import rope
from hmc.models.routing import softmax_moe
from hmc.ops import OPS, Attrs, Op, Role, State, Use
from hmc.ops.row import Weights, attr, picked, spec
from hmc.plan import Step
from hmc.runtime.host.lowering import Lowering
from hmc.runtime.host.ops import HOST_OPS

NAME = "running"


# -- the row ---------------------------------------------------------------------------------------


def _kernels(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    return (spec(NAME, use, picked(attrs, "width")),)


ROW = Op(
    NAME,
    inputs=(
        Role("x", "f32", attr("width")),
        Role("positions", "i32", lambda attrs: 1, given="positions"),
    ),
    outputs=(Role("y", "f32", attr("width")),),
    attrs={"width": int, "decay": float},
    kernels=_kernels,
    states=lambda attrs: (State("running", int(attrs["width"]), "sequence", "f32"),),
    family="attention",
)


# -- the reference and the block -------------------------------------------------------------------


def reference(
    attrs: Attrs, inputs: Tensors, weights: Tensors, states: Tensors
) -> tuple[Tensors, Tensors]:
    """x [S, T, width], running [S, width]."""
    state, made = states["running"], []
    for x in inputs["x"].unbind(1):
        state = attrs["decay"] * state + x
        made.append(state)
    return {"y": torch.stack(made, 1)}, {"running": state}


class Running(Block):
    """x [T, width] -> y [T, width], from a state of zeros."""

    kind = NAME

    def __init__(self, width: int, decay: float) -> None:
        super().__init__()
        self.width, self.decay = width, decay

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        return attrs(width=self.width, decay=self.decay)

    def forward(self, x: Tensor) -> Tensor:
        before = {"running": torch.zeros(1, self.width)}
        made, _ = reference(dict(self.attributes()), {"x": x[None]}, {}, before)
        return made["y"][0]


# -- the kernel, and how it is called --------------------------------------------------------------

_POINTERS = ("x", "y", "state", "sequence")
_NUMBERS = ("x_stride", "y_stride", "state_stride", "tokens")
ARGUMENTS = (
    *(Arg(name, "ptr") for name in _POINTERS),
    *(Arg(name) for name in _NUMBERS),
    Arg("decay", "f32"),
)


def emit(spec: KernelSpec) -> str:
    """Split by column; a worker takes the tokens in order."""
    e = Emitter(spec)
    b = e.b

    def row(name: str, number: Value, column: Value) -> Value:
        return e.at(e.arg[name], b.add(b.mul(number, e.arg[f"{name}_stride"]), column), F32)

    start, stop = e.split(const(spec["width"]))
    with e.for_range(start, stop) as column, e.for_range(0, e.arg["tokens"]) as token:
        slot = b.sext(e.load(e.arg["sequence"], token, I32), I64)
        kept = row("state", slot, column)
        value = e.fma(e.arg["decay"], b.load(kept), b.load(row("x", token, column)))
        b.store(value, kept)
        b.store(value, row("y", token, column))
    return e.finish()


def lower(low: Lowering, step: Step) -> None:
    """One record. A token's slot has the number of its sequence's row."""
    x, y, state = step.inputs["x"], step.outputs["y"], (NAME, step.layer)
    low.add(
        step,
        low.specs(step)[NAME],
        reads=[x, state],
        writes=[y, state],
        x=low.arena.address(x),
        x_stride=low.arena.stride(x),
        y=low.arena.address(y),
        y_stride=low.arena.stride(y),
        state=low.kv.address(step.layer, "running"),
        state_stride=int(step.attrs["width"]),
        sequence=int(low.arena.sequence.ctypes.data),
        decay=float(step.attrs["decay"]),
    )


# -- the family ------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Layer 0 attends, layer 1 has a linear layer instead and no cache but the running average,
    layer 2 attends with one key head and no average.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, eps = config.require_int("hidden_size"), norm_eps(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.attends, self.averages = index != 1, index != 2
        if self.attends:
            values = {**config.values, "num_key_value_heads": 1 if index == 2 else 2}
            angles = rope(config, config.require_int("head_dim"))
            inner = ModelConfig(config.path, values, config.sha256)
            self.mixer: nn.Module = GroupedQueryAttention(inner, angles)
        else:
            self.mixer = Linear(hidden, hidden)
        self.running = Running(hidden, 0.75)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = softmax_moe(config)

    @property
    def attention_half(self) -> tuple[nn.Module, ...]:
        """The modules of the layer's first half."""
        return self.input_layernorm, self.mixer, self.running

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        x = self.input_layernorm(h)
        y = self.mixer(x, positions) if self.attends else self.mixer(x)
        h = h + (self.running(y) if self.averages else y)
        return h + self.mlp(self.post_attention_layernorm(h))  # type: ignore[no-any-return]


def build(config: ModelConfig) -> nn.Module:
    """The model of a config.json of `model_type` "running"."""
    return CausalLM(config, lambda index: Layer(config, index))


CONFIG: dict[str, Any] = {
    "model_type": NAME,
    "architectures": ["RunningForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 1,
}


@contextmanager
def registered() -> Iterator[None]:
    """Tell hmc of all of it, and take it back."""
    tables: list[tuple[dict[str, Any], Any]] = [
        (OPS, ROW),
        (REFERENCES, reference),
        (ARGS, ARGUMENTS),
        (EMITTERS, emit),
        (HOST_OPS, lower),
        (FAMILIES, Family(NAME, build)),
    ]
    with pytest.MonkeyPatch.context() as patched:
        for table, entry in tables:
            patched.setitem(table, NAME, entry)
        yield
