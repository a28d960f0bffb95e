"""Mistral Large 4: latent attention to the positions that an indexer chooses, whose queries grow
with the logarithm of their position, in some layers without rotary embedding, the frequencies of
which are learned elsewhere; layers may share the latents of an earlier one. Softmax routing and
shared experts; a soft cap of the logits.
"""

from __future__ import annotations

from torch import Tensor, nn

from hmc.blocks import Columns, Index, Linear, PositionScale, RMSNorm, Rotary, SparseMLA
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import CausalLM, DecoderLayer, check_values, norm_eps
from hmc.models.deepseek_v32 import Latest, sharing
from hmc.models.family import LOOKS_AHEAD, NO_IMAGES, Aside, Family
from hmc.models.mistral4 import routed_mlp
from hmc.models.norms import LayerNorm
from hmc.models.rope import Rope, rope
from hmc.models.routing import dense_mlp, is_routed

_EPS = 1e-6
"""Epsilon of an indexer's norms, a constant of the architecture."""
_LEARNED = "lerope.alpha"
_CAP = 30.0
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2048.0,
    "original_max_position_embeddings": 512,
    "attention_factor": 1.0,
}
"""What the architecture has where a configuration says nothing."""


class Indexer(nn.Module):
    """Projections, norms and scales around `Index`, whose choice is the `latest`; without rotary
    embedding where there is no `rope`.
    """

    def __init__(self, config: ModelConfig, rope: Rope | None, latest: Latest) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        heads = config.require_int("index_n_heads", minimum=1)
        dim = config.require_int("index_head_dim", minimum=1)
        self.latest = latest
        self.q_input_norm = LayerNorm(hidden, _EPS, bias=True)
        self.wq_b = Linear(hidden, heads * dim)
        self.softmax_scaling = PositionScale(heads, dim)
        self.wk = Linear(hidden, dim)
        self.k_norm = LayerNorm(dim, _EPS, bias=True)
        self.weights_proj = Linear(hidden, heads)
        self.q_rotary = self.k_rotary = None
        if rope is not None:
            if 2 * len(rope.inv_freq) > dim:
                raise config.error("index_head_dim", f"is {dim}, less than what is rotated of it")
            self.q_rotary, self.k_rotary = (_rotary(n, dim, rope) for n in (heads, 1))
        self.index = Index(heads, dim, config.require_int("index_topk", minimum=1))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q = self.softmax_scaling(self.wq_b(self.q_input_norm(x)), positions)
        k = self.k_norm(self.wk(x))
        if self.q_rotary is not None and self.k_rotary is not None:
            q, k = self.q_rotary(q, positions), self.k_rotary(k, positions)
        self.latest.chosen = self.index(q, k, self.weights_proj(x))
        return self.latest.chosen


Latents = dict[int, tuple[Tensor, ...]]
"""The new latents, and what of them is rotated, that layers of a running model keep for others."""


class Attention(nn.Module):
    """Attention of a layer to what an indexer chose, its own or an earlier one. Latents are of the
    layer `source`, `made` by it where that is an earlier one.
    """

    def __init__(
        self, config: ModelConfig, rope: Rope, index: int, latest: Latest, made: Latents
    ) -> None:
        super().__init__()
        hidden, eps = config.require_int("hidden_size"), norm_eps(config)
        heads = config.require_int("num_attention_heads", minimum=1)
        nope = config.require_int("qk_nope_head_dim", minimum=1)
        rotated = config.require_int("qk_rope_head_dim", minimum=2)
        v_dim = config.require_int("v_head_dim", minimum=1)
        rank = config.require_int("kv_lora_rank", minimum=1)
        most = config.require_int("index_topk", minimum=1)
        scale = (nope + rotated) ** -0.5 * rope.mscale**2
        turns = _turning(config)[index]
        if not turns:
            nope, rotated = nope + rotated, 0
        self.index, self.source, self.made = index, _sources(config)[index], made
        self.q_proj = Linear(hidden, heads * (nope + rotated))
        self.softmax_scaling = PositionScale(heads, nope + rotated)
        own = self.source == index
        if own:
            self.kv_a_proj_with_mqa = Linear(hidden, rank + rotated)
            self.kv_a_layernorm = RMSNorm(rank, eps)
        self.q_rotary = self.k_rotary = None
        if turns:
            self.q_rotary = _rotary(heads, nope + rotated, rope, start=nope)
        if own and turns:
            self.latent, self.k_rope = Columns(0, 0, rank), Columns(1, rank, rotated)
            self.k_rotary = _rotary(1, rotated, rope)
        shared = sharing(config)[index]
        self.indexer = None if shared else Indexer(config, rope if turns else None, latest)
        self.latest = latest
        source = None if own else self.source
        self.mla = SparseMLA(heads, nope, rotated, v_dim, rank, scale, most, source=source)
        self.o_proj = Linear(heads * v_dim, hidden)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        chosen = self.latest.chosen if self.indexer is None else self.indexer(x, positions)
        q = self.q_proj(x)
        if self.q_rotary is not None:
            q = self.q_rotary(q, positions)
        if self.source == self.index:
            self.made[self.index] = self._latents(x, positions)
        q = self.softmax_scaling(q, positions)
        return self.o_proj(self.mla(q, *self.made[self.source], chosen))  # type: ignore[no-any-return]

    def _latents(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        compressed = self.kv_a_proj_with_mqa(x)
        if self.k_rotary is None:
            return (self.kv_a_layernorm(compressed),)
        k_rope = self.k_rotary(self.k_rope(compressed), positions)
        return self.kv_a_layernorm(self.latent(compressed)), k_rope


def _rotary(heads: int, dim: int, rope: Rope, start: int = 0) -> Rotary:
    """Neighbours are turned, by learned multiples of the frequencies."""
    return Rotary(
        heads,
        dim,
        rope.inv_freq,
        start=start,
        interleaved=True,
        factor=rope.factor,
        learned=_LEARNED,
    )


def build(config: ModelConfig) -> nn.Module:
    """The model of the text part of a Mistral Large 4 config.json."""
    check_values(config, attention_bias=False, hidden_act="silu")
    if "rope_parameters" not in config and "rope_scaling" not in config:
        config = config.with_text(rope_parameters=_ROPE)
    angles = rope(config, config.require_int("qk_rope_head_dim", minimum=2))
    latest, made = Latest(), Latents()

    def layer(index: int) -> nn.Module:
        attention = Attention(config, angles, index, latest, made)
        if is_routed(config, index, first=1):
            return DecoderLayer(config, attention, routed_mlp(config, normalise=True))
        return DecoderLayer(config, attention, dense_mlp(config))

    return CausalLM(config, layer, logit_cap=config.get_float("final_logit_softcapping", _CAP))


def _turning(config: ModelConfig) -> tuple[bool, ...]:
    """Whether each layer has rotary embedding: 1 in `no_rope_layers`, else all but each
    `no_rope_layer_interval`-th.
    """
    key, depth = "no_rope_layers", config.require_int("num_hidden_layers")
    if not (found := config.get_ints(key)):
        every = config.get_int("no_rope_layer_interval", 4, minimum=1)
        return tuple((index + 1) % every > 0 for index in range(depth))
    if len(found) < depth or {*found} - {0, 1}:
        raise config.error(key, f"must say 0 or 1 for each of {depth} layers")
    return tuple(each == 1 for each in found[:depth])


def _sources(config: ModelConfig) -> tuple[int, ...]:
    """The layer whose latents each layer attends to: by `kv_source_layers`, else its own."""
    key, depth = "kv_source_layers", config.require_int("num_hidden_layers")
    found = config.get_ints(key) or tuple(range(depth))
    if len(found) < depth:
        raise config.error(key, f"must name a layer for each of {depth} layers")
    turns = _turning(config)
    for index, source in enumerate(found[:depth]):
        if not 0 <= source <= index or found[source] != source or turns[source] != turns[index]:
            raise config.error(
                key,
                f"says {source} for layer {index}, must be a layer up to it with latents of"
                " its own, rotated as those of this layer are",
            )
    return found[:depth]


_NEEDS = (
    "latent attention to tokens that an indexer chooses, learned rotary frequencies, layers without"
    " rope, queries scaled by the logarithm of their position, layers that share latents, soft cap"
    " of logits; text alone"
)
_NAMES = (
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^lm_head\.", "output."),
    (r"^model\.", ""),
    (r"\.self_attn\.", ".attention."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.q_proj\.", ".wq."),
    (r"\.kv_a_proj_with_mqa\.", ".wkv_a_with_mqa."),
    (r"\.kv_a_layernorm\.", ".kv_a_norm."),
    (r"\.kv_b_proj\.", ".wkv_b."),
    (r"\.o_proj\.", ".wo."),
    (r"\.softmax_scaling\.scale$", ".ssmax_scaling.s"),
    (r"\.softmax_scaling\.bias$", ".ssmax_scaling.b"),
    (r"\.mlp\.(gate|experts|shared_experts)\.", r".\1."),
    (r"\.mlp\.", ".feed_forward."),
    (r"\.gate_proj\.", ".w1."),
    (r"\.down_proj\.", ".w2."),
    (r"\.up_proj\.", ".w3."),
)


def _aside(config: ModelConfig) -> tuple[Aside, ...]:
    towers = ("vision_encoder", "pre_mm_projector_norm", "patch_merger", "vision_language_adapter")
    images = (Aside(f"{name}.*", NO_IMAGES) for name in towers)
    return *images, Aside("mtp_dspark.*", LOOKS_AHEAD)


FAMILIES = (
    Family(
        "mistral_large4",
        build,
        _NEEDS,
        ("mistralai/Mistral-Large-4-1T-A52B",),
        names=_NAMES,
        aside=_aside,
    ),
)
