"""What the families share: the decoder around the layers, grouped-query attention, routed MLPs, and
checks of common options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    place,
)
from hmc.checkpoint.config import ModelConfig
from hmc.errors import UnsupportedError
from hmc.models.rope import Rope


class CausalLM(nn.Module):
    """Embedding, layers, final norm and output layer: (ids [T], positions [T]) -> logits [T, vocab]
    float32.
    """

    def __init__(self, config: ModelConfig, layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        check_activation(config)
        hidden = config.require_int("hidden_size", minimum=1)
        vocab = config.require_int("vocab_size", minimum=1)
        tied = config.get_bool("tie_word_embeddings", False)
        self.model = Backbone(config, vocab, hidden, layer)
        self.lm_head = Linear(hidden, vocab, tied="model.embed_tokens.weight" if tied else None)
        place(self.lm_head, -1, "head")

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.lm_head(self.model(ids, positions))  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """`CausalLM` without its output layer."""

    def __init__(
        self, config: ModelConfig, vocab: int, hidden: int, layer: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        depth = config.require_int("num_hidden_layers", minimum=1)
        self.embed_tokens = Embedding(vocab, hidden)
        self.layers = nn.ModuleList(_placed(layer(index), index) for index in range(depth))
        self.norm = RMSNorm(hidden, norm_eps(config))
        place(self.norm, -1, "head")

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        h = self.embed_tokens(ids)
        for layer in self.layers:
            h = layer(h, positions)
        return self.norm(h)  # type: ignore[no-any-return]


def _placed(layer: nn.Module, index: int) -> nn.Module:
    """A layer whose first half, as it says itself, is "attention"; the rest is "mlp"."""
    place(layer, index, "mlp")
    for half in layer.attention_half:  # type: ignore[union-attr]
        place(half, index, "attention")
    return layer


class DecoderLayer(nn.Module):
    """Pre-norm residual layer: h + attention(norm(h)), then + mlp(norm(h)).

    `mlp_name` is what the checkpoint calls the second half.
    """

    def __init__(
        self, config: ModelConfig, attention: nn.Module, mlp: nn.Module, mlp_name: str = "mlp"
    ) -> None:
        super().__init__()
        hidden, eps = config.require_int("hidden_size"), norm_eps(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.add_module(mlp_name, mlp)
        self.mlp_name = mlp_name

    @property
    def attention_half(self) -> tuple[nn.Module, ...]:
        """The modules of the layer's first half."""
        return self.input_layernorm, self.self_attn

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), positions)
        mlp = self.get_submodule(self.mlp_name)
        return h + mlp(self.post_attention_layernorm(h))  # type: ignore[no-any-return]


class GroupedQueryAttention(nn.Module):
    """Attention with rotary embedding over the whole head, of neighbours where the config says
    `rope_interleave`; with per-head norms of q and k where `qk_norm`.
    """

    def __init__(
        self, config: ModelConfig, rope: Rope, *, bias: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        heads, kv_heads, dim = attention_heads(config)
        self.q_proj = Linear(hidden, heads * dim, bias=bias)
        self.k_proj = Linear(hidden, kv_heads * dim, bias=bias)
        self.v_proj = Linear(hidden, kv_heads * dim, bias=bias)
        self.o_proj = Linear(heads * dim, hidden, bias=bias)
        self.q_norm = RMSNorm(dim, norm_eps(config), heads) if qk_norm else None
        self.k_norm = RMSNorm(dim, norm_eps(config), kv_heads) if qk_norm else None
        pairs = config.get_bool("rope_interleave", False)
        turned = partial(Rotary, inv_freq=rope.inv_freq, interleaved=pairs, factor=rope.factor)
        self.q_rotary, self.k_rotary = turned(heads, dim), turned(kv_heads, dim)
        self.attention = Attention(heads, kv_heads, dim, dim, dim**-0.5)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.q_rotary(q, positions), self.k_rotary(k, positions)
        return self.o_proj(self.attention(q, k, v))  # type: ignore[no-any-return]


class MoE(nn.Module):
    """The routed MLP of a layer: the experts, `intermediate` wide, that `route` chooses by the
    gate's logits, and beside them `shared` ones that every token goes through.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        route: Route,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        shared: int = 0,
    ) -> None:
        super().__init__()
        self.gate = Linear(hidden, route.experts)
        self.route = route
        self.experts = Experts(route.experts, hidden, intermediate, route.top_k, names)
        self.shared_experts = GatedMLP(hidden, intermediate * shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        routed = self.experts(x, self.route(self.gate(x)))
        if self.shared_experts is None:
            return routed  # type: ignore[no-any-return]
        return routed + self.shared_experts(x)  # type: ignore[no-any-return]


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


def routed_experts(config: ModelConfig, *keys: str) -> tuple[int, int]:
    """(routed experts, experts a token), the first from whichever of `keys` the config has."""
    key = next((key for key in keys if key in config), keys[0])
    experts = config.require_int(key, minimum=1)
    top_k = config.require_int("num_experts_per_tok", minimum=1)
    if top_k > experts:
        raise config.error("num_experts_per_tok", f"is {top_k}, more than the {experts} experts")
    return experts, top_k


def norm_eps(config: ModelConfig) -> float:
    """Epsilon of the hidden-state norms."""
    return config.require_float("rms_norm_eps")


def check_activation(config: ModelConfig) -> None:
    """Refuse activations hmc has no kernel for."""
    if (act := config.get_str("hidden_act", "silu")) != "silu":
        raise UnsupportedError(
            f"{config.path}: hidden_act {act!r} is not 'silu', the one hmc knows"
        )


def check_window(config: ModelConfig) -> None:
    """Refuse a sliding window that would ever hide a token."""
    context = config.require_int("max_position_embeddings", minimum=1)
    if (window := config.get_int("sliding_window", context)) < context:
        raise UnsupportedError(
            f"{config.path}: sliding_window {window} is shorter than the context of {context}"
            " tokens; hmc attends to every earlier token"
        )
