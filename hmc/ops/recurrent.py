"""Ops that keep a state of fixed size a sequence instead of a cache that grows: short convolutions,
linear attention, selective scans.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from hmc.codegen.expr import elementwise
from hmc.codegen.spec import MAX_TAPS, KernelSpec
from hmc.errors import KernelError
from hmc.ops.row import (
    Attrs,
    Load,
    Op,
    Role,
    State,
    Use,
    WeightRole,
    Weights,
    Work,
    attr,
    one_kernel,
    picked,
    product,
    spec,
)

# -- short convolution -----------------------------------------------------------------------------


def _conv(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, "width", "taps") | ({"biased": 1} if "bias" in weights else {})
    return (spec("conv", use, sizes, expr=str(attrs["act"])),)


def _conv_possible(attrs: Attrs) -> bool:
    try:
        elementwise(str(attrs["act"]), "x")
    except KernelError:
        return False
    width, taps = picked(attrs, "width", "taps").values()
    return width > 0 and 2 <= taps <= MAX_TAPS and bool(attrs["state"])


def _conv_state(attrs: Attrs) -> tuple[State, ...]:
    width, taps = picked(attrs, "width", "taps").values()
    return (State(str(attrs["state"]), (taps - 1) * width, "sequence", "f32"),)


def _conv_launches(attrs: Attrs, load: Load) -> int:
    """By its reference: a product and a sum a tap, and what brings rows and states together."""
    return 2 * int(attrs["taps"]) + 8


# -- linear attention ------------------------------------------------------------------------------

_SIZES = ("heads", "key_heads", "key_dim", "value_dim", "channels", "delta")


def _linear_attention(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    name = "linear_attention_prefill" if use.many else "linear_attention"
    sizes = picked(attrs, *_SIZES) | ({"tiled": 1} if attrs["tiled"] else {})
    return (spec(name, use, sizes),)


def _grouped(attrs: Attrs) -> bool:
    heads, key_heads, *dims, channels, delta = picked(attrs, *_SIZES).values()
    flags = {channels, delta, int(attrs["tiled"])}
    return min(heads, key_heads, *dims) > 0 and heads % key_heads == 0 and flags <= {0, 1}


def decays(attrs: Attrs) -> int:
    """Columns of the decay: one a head, or one for each of its channels of keys."""
    heads, key_dim, channels = picked(attrs, "heads", "key_dim", "channels").values()
    return heads * (key_dim if channels else 1)


def _held(attrs: Attrs) -> int:
    heads, key_dim, value_dim = picked(attrs, "heads", "key_dim", "value_dim").values()
    return heads * key_dim * value_dim


def chunk_tokens(attrs: Attrs) -> int:
    """Tokens of one sequence that devices take at once: fewer where pairs of them decay by
    channels.
    """
    return 16 if attrs["channels"] else 64


def _linear_attention_work(attrs: Attrs, load: Load) -> Work:
    """A token decays the state, adds to it and reads it; the delta rule reads it once more. A GPU
    has the states of single tokens in hand four times, and a prompt's twice a chunk beside what
    pairs of tokens make.
    """
    passes = 6 + 2 * int(attrs["delta"])
    scores = float(passes * _held(attrs)) * load.rows
    if load.rows <= load.sequences:
        return Work(1.0, load.rows, scores=scores, made=8 * 4.0 * _held(attrs) * load.rows)
    chunk, pairs = chunk_tokens(attrs), decays(attrs) + 2 * int(attrs["heads"])
    made = 4 * 4.0 * _held(attrs) / chunk + 3 * 4.0 * chunk * pairs
    return Work(1.0, load.rows, scores=scores, made=made * load.rows)


def _linear_attention_launches(attrs: Attrs, load: Load) -> int:
    """Those of one token of each sequence, or of a prompt's chunks after what is common to all."""
    delta = int(attrs["delta"])
    if load.rows <= load.sequences:
        return 9 + 3 * delta
    chunks = -(-int(load.tokens) // chunk_tokens(attrs))
    return 24 + 12 * delta + (4 + 2 * delta) * chunks


# -- selective scan --------------------------------------------------------------------------------


def _scan_work(attrs: Attrs, load: Load) -> Work:
    """An element decays by an exponential, is added to, and read."""
    return Work(1.0, load.rows, scores=8.0 * int(attrs["width"]) * int(attrs["states"]) * load.rows)


def _scan_launches(attrs: Attrs, load: Load) -> int:
    """By its reference, one token of every sequence after the other."""
    return 6 + 9 * ceil(load.rows / load.sequences)


def _matrix(attrs: Attrs) -> tuple[int, ...]:
    return int(attrs["width"]), int(attrs["states"])


OPS: Final = (
    Op(
        # y_t = act(sum_i weight[:, i] x_(t - taps + 1 + i) + bias), column by column
        "conv",
        inputs=(Role("x", "f32", attr("width")),),
        outputs=(Role("y", "f32", attr("width")),),
        weights=(
            WeightRole("weight", lambda a: (int(a["width"]), 1, int(a["taps"])), vector=True),
            WeightRole("bias", lambda a: (int(a["width"]),), optional=True, vector=True),
        ),
        attrs={"width": int, "taps": int, "act": str, "state": str},
        possible=_conv_possible,
        kernels=_conv,
        states=_conv_state,
        launches=_conv_launches,
        family="attention",
    ),
    Op(
        # of each head, S [key_dim, value_dim]: S <- decay S; S <- S + k (v - k S) beta with the
        # delta rule, S <- S + k v without; y = scale q S. Heads that share one of keys lie side by
        # side or, tiled, as far apart as there are heads of keys
        "linear_attention",
        inputs=(
            Role("q", "f32", product("key_heads", "key_dim")),
            Role("k", "f32", product("key_heads", "key_dim")),
            Role("v", "f32", product("heads", "value_dim")),
            Role("decay", "f32", decays),
            Role("beta", "f32", attr("heads"), optional=True),
        ),
        outputs=(Role("y", "f32", product("heads", "value_dim")),),
        attrs={**dict.fromkeys((*_SIZES, "tiled"), int), "scale": float},
        possible=_grouped,
        kernels=_linear_attention,
        named=lambda a: ("q", "k", "v", "decay", *(["beta"] if a["delta"] else [])),
        states=lambda a: (State("recurrent", _held(a), "sequence", "f32"),),
        work=_linear_attention_work,
        launches=_linear_attention_launches,
        family="attention",
    ),
    Op(
        # of each column, s [states]: s <- exp(a dt) s + dt x b; y = c s. With log, -exp(a) for a
        "selective_scan",
        inputs=(
            Role("x", "f32", attr("width")),
            Role("dt", "f32", attr("width")),
            Role("b", "f32", attr("states")),
            Role("c", "f32", attr("states")),
        ),
        outputs=(Role("y", "f32", attr("width")),),
        weights=(WeightRole("a", _matrix, vector=True),),
        attrs={"width": int, "states": int, "log": int},
        possible=lambda a: min(picked(a, "width", "states").values()) > 0 and a["log"] in (0, 1),
        kernels=one_kernel("selective_scan", "width", "states"),
        states=lambda a: (State("scan", int(a["width"]) * int(a["states"]), "sequence", "f32"),),
        work=_scan_work,
        launches=_scan_launches,
        family="attention",
    ),
)
