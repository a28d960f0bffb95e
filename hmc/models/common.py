"""What the families share: the decoder around the layers, grouped-query attention, routed MLPs, and
checks of common options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hmc.blocks import (
    Attention,
    Embedding,
    Experts,
    GatedMLP,
    Linear,
    RMSNorm,
    Rotary,
    Route,
    SparseAttention,
    place,
)
from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.views import View
from hmc.errors import UnsupportedError
from hmc.models.activations import activation
from hmc.models.rope import Rope
from hmc.models.stacks import Stacks


class CausalLM(nn.Module):
    """Embedding, layers, final norm and output layer: (ids [T], positions [T]) -> logits [T, vocab]
    float32. Embeddings are multiplied by `embed_scale`, logits by `logit_scale`, and become c
    tanh(x / c) with a `logit_cap` c; `norm` makes the last norm; `bias` is that of the output
    layer. MLPs without an activation of their own have the configuration's. `hyper` makes, where
    layers work on several residual streams, what spreads embeddings over them, and what the last
    norm reads of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: Callable[[int], nn.Module],
        *,
        embed_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_cap: float = 0.0,
        norm: Callable[[ModelConfig], nn.Module] | None = None,
        bias: bool = False,
        hyper: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        act = activation(config)
        hidden = config.require_int("hidden_size", minimum=1)
        vocab = config.require_int("vocab_size", minimum=1)
        tied = config.get_bool("tie_word_embeddings", False)
        self.logit_scale, self.logit_cap = logit_scale, logit_cap
        last = (norm or hidden_norm)(config)
        self.model = Backbone(config, Embedding(vocab, hidden), layer, last, embed_scale, hyper)
        table = "model.embed_tokens.weight" if tied else None
        self.lm_head = Linear(hidden, vocab, bias=bias, tied=table)
        place(self.lm_head, -1, "head")
        for module in self.modules():
            if isinstance(module, GatedMLP | Experts):
                module.act = module.act or act

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits = self.lm_head(self.model(ids, positions))
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        cap = self.logit_cap
        return torch.tanh(logits / cap) * cap if cap else logits


class Backbone(nn.Module):
    """`CausalLM` without its output layer."""

    def __init__(
        self,
        config: ModelConfig,
        embed_tokens: Embedding,
        layer: Callable[[int], nn.Module],
        norm: nn.Module,
        embed_scale: float,
        hyper: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.embed_scale = embed_scale
        depth = config.depth
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(_placed(layer(index), index) for index in range(depth))
        self.norm = place(norm, -1, "head")
        self.spread = self.hc_head = None
        if hyper is not None:
            self.spread, self.hc_head = (
                place(hyper[0], 0, "attention"),
                place(hyper[1], depth - 1, "mlp"),
            )

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        h = self.embed_tokens(ids)
        if self.embed_scale != 1.0:
            h = h * self.embed_scale
        if self.spread is not None:
            h = self.spread(h)
        for layer in self.layers:
            h = layer(h, positions)
        if self.hc_head is not None:
            h = self.hc_head(h)
        return self.norm(h)  # type: ignore[no-any-return]


def _placed(layer: nn.Module, index: int) -> nn.Module:
    """A layer whose first half, as it says itself, is "attention"; the rest is "mlp"."""
    place(layer, index, "mlp")
    for half in layer.attention_half:  # type: ignore[union-attr]
        place(half, index, "attention")
    return layer


class Norms(NamedTuple):
    """What the norms of a layer are called, in the order of the layer; "" where there is none."""

    attention_in: str = "input_layernorm"
    attention_out: str = ""
    mlp_in: str = "post_attention_layernorm"
    mlp_out: str = ""


PRE_NORM = Norms()
Norm = Callable[[ModelConfig], nn.Module]
SizedNorm = Callable[[int, float, int], nn.Module]
"""Makes the norm of so many groups of a size, with an epsilon: (size, epsilon, groups)."""


class DecoderLayer(nn.Module):
    """Residual layer: h + attention(h), then + mlp(h), with norms of what goes into each half and
    of what comes out, as `norms` says; `norm` makes one. Without a norm of what goes into the MLP,
    a `parallel` layer gives it what attention gets.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: nn.Module,
        mlp: nn.Module,
        norms: Norms = PRE_NORM,
        norm: Norm | None = None,
        *,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.norms, self.parallel = norms, parallel
        for name in filter(None, norms):
            self.add_module(name, (norm or hidden_norm)(config))

    @property
    def attention_half(self) -> tuple[nn.Module, ...]:
        """The modules of the layer's first half."""
        norms = filter(None, (self.norms.attention_in, self.norms.attention_out))
        return self.self_attn, *map(self.get_submodule, norms)

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        x = self._norm(self.norms.attention_in, h)
        h = h + self._norm(self.norms.attention_out, self.self_attn(x, positions))
        if not self.parallel:
            x = self._norm(self.norms.mlp_in, h)
        return h + self._norm(self.norms.mlp_out, self.mlp(x))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x) if name else x


class GroupedQueryAttention(nn.Module):
    """Attention with rotary embedding over the first elements of each head, as many as `rope` has
    (None: without).

    q and k are normed by head or over the whole projection, before rotary embedding or after it, as
    `qk_norm` says, by norms that `norm` makes; `clip` bounds the magnitude of q, k and v. `bias` is
    that of q, k and v, `out_bias` that of the output projection, `heads` (query heads, key heads,
    elements a head) where they are not what the configuration says for all layers. `fused` names
    the one tensor beside the block that holds the rows of q, k and v (then without biases). Heads
    of values have `v_dim` elements (0: as many as keys), times `v_scale`; scores are multiplied by
    `scale` (0: one over the root of a head's elements). Rotary embedding pairs neighbours where the
    configuration says `rope_interleave`, or else `interleaved`. `options` are those of the block
    `Attention`: windows, chunks, sinks, soft caps. A family that gates what comes out overrides
    `gated`, one whose attention asks for more `mixed`.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: Rope | None,
        *,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: Literal["", "head", "width"] = "",
        norm: SizedNorm = RMSNorm,
        norm_last: bool = False,
        clip: float = 0.0,
        heads: tuple[int, int, int] | None = None,
        fused: str = "",
        v_dim: int = 0,
        v_scale: float = 1.0,
        scale: float = 0.0,
        interleaved: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        count, kv_count, dim = heads or attention_heads(config)
        widths = (count * dim, kv_count * dim, kv_count * (v_dim or dim))

        def linear(part: int) -> Linear:
            view = View((sum(widths), hidden), sum(widths[:part]))
            within = (fused, view) if fused else None
            return Linear(hidden, widths[part], bias=bias, within=within)

        self.q_proj, self.k_proj, self.v_proj = map(linear, range(3))
        self.o_proj = Linear(count * (v_dim or dim), hidden, bias=out_bias)
        self.q_norm = _qk_norm(config, qk_norm, norm, count, dim)
        self.k_norm = _qk_norm(config, qk_norm, norm, kv_count, dim)
        self.norm_last, self.clip, self.v_scale = norm_last, clip, v_scale
        self.q_rotary = self.k_rotary = None
        if rope is not None:
            pairs = config.get_bool("rope_interleave", interleaved)
            turn = partial(Rotary, factor=rope.factor, interleaved=pairs)
            self.q_rotary = turn(count, dim, rope.inv_freq)
            self.k_rotary = turn(kv_count, dim, rope.inv_freq)
        scale = scale or dim**-0.5
        self.attention: Attention | SparseAttention = Attention(
            count, kv_count, dim, v_dim or dim, scale, **options
        )

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.norm_last:
            q, k = self._normed(q, k)
        if self.clip:
            q, k, v = (each.clamp(-self.clip, self.clip) for each in (q, k, v))
        if self.v_scale != 1.0:
            v = v * self.v_scale
        if self.q_rotary is not None and self.k_rotary is not None:
            q, k = self.q_rotary(q, positions), self.k_rotary(k, positions)
        if self.norm_last:
            q, k = self._normed(q, k)
        return self.o_proj(self.gated(x, self.mixed(x, positions, q, k, v)))  # type: ignore[no-any-return]

    def mixed(self, x: Tensor, positions: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What heads make of their queries, keys and values."""
        return self.attention(q, k, v)  # type: ignore[no-any-return]

    def gated(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What goes into the output projection, of the block's input and of what heads mixed."""
        return mixed

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


def _qk_norm(
    config: ModelConfig, kind: str, norm: SizedNorm, heads: int, dim: int
) -> nn.Module | None:
    if not kind:
        return None
    size, groups = (dim, heads) if kind == "head" else (heads * dim, 1)
    return norm(size, norm_eps(config), groups)


class MoE(nn.Module):
    """The routed MLP of a layer: the experts, `intermediate` wide, that `route` chooses by the
    gate's logits, and beside them `shared`, which every token goes through; `weighed`, that one's
    result is multiplied by the sigmoid of a gate of its own. `act` is the experts' activation
    where it is not the configuration's, `stacked` says where they lie that share tensors
    (hmc/models/stacks.py); with `bias` they and the gate have biases.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        route: Route,
        shared: nn.Module | None = None,
        *,
        weighed: bool = False,
        act: str = "",
        stacked: Stacks | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.gate = Linear(hidden, route.experts, bias=bias)
        self.route = route
        self.experts = Experts(
            route.experts, hidden, intermediate, route.top_k, act=act, stacked=stacked, bias=bias
        )
        self.shared_experts = shared
        self.shared_gate = Linear(hidden, 1) if weighed else None

    def forward(self, x: Tensor) -> Tensor:
        routed = self.experts(x, self.route(self.gate(x)))
        if self.shared_experts is None:
            return routed  # type: ignore[no-any-return]
        shared = self.shared_experts(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(x)) * shared
        return routed + shared  # type: ignore[no-any-return]


def attention_heads(config: ModelConfig) -> tuple[int, int, int]:
    """(query heads, key heads, elements a head); heads absent for keys or sizes follow from the
    others.
    """
    heads = config.require_int("num_attention_heads", minimum=1)
    kv_heads = config.get_int("num_key_value_heads", heads, minimum=1)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"is {kv_heads}, must divide the {heads} heads")
    dim = config.get_int("head_dim", config.require_int("hidden_size") // heads, minimum=1)
    return heads, kv_heads, dim


def hidden_norm(config: ModelConfig) -> RMSNorm:
    """A norm of hidden states."""
    return RMSNorm(config.require_int("hidden_size"), norm_eps(config))


def norm_eps(config: ModelConfig) -> float:
    """Epsilon of the hidden-state norms."""
    keys = (
        *("rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "layer_norm_epsilon"),
        "norm_eps",
    )
    return config.require_float(next((key for key in keys if key in config), keys[0]))


def check_window(config: ModelConfig) -> None:
    """Refuse a sliding window that would ever hide a token."""
    context = config.require_int("max_position_embeddings", minimum=1)
    if (window := config.get_int("sliding_window", context)) < context:
        raise UnsupportedError(
            f"{config.path}: sliding_window {window} is shorter than the context of {context}"
            " tokens; hmc attends to every earlier token"
        )


def check_values(config: ModelConfig, **known: str | int) -> None:
    """Refuse a key whose value, where it has one, is not the one hmc knows."""
    for key, value in known.items():
        if config.values.get(key) not in (None, value):
            raise config.unsupported(key, repr(value))
