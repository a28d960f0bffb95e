"""MiniMax-M3: grouped-query attention with norms of q and k by head and a part of each head
rotated; in most layers to the blocks of positions that an indexer chooses. Sigmoid routing with a
correction bias beside a shared expert, among dense layers; gates and ups are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hmc.blocks import GatedMLP, IndexBlocks, Linear, Rotary, SparseAttention
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import gated
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    attention_heads,
    check_values,
    norm_eps,
)
from hmc.models.family import LOOKS_AHEAD, NO_IMAGES, W123, Aside, Family
from hmc.models.norms import CentredNorm
from hmc.models.rope import Rope, rope
from hmc.models.routing import biased_moe
from hmc.models.windows import FULL

SPARSE = "minimax_m3_sparse"
_SECTION = "sparse_attention_config"


class ChoosingAttention(GroupedQueryAttention):
    """Attention to the blocks that an indexer chooses, as `sizes`, arguments of `IndexBlocks`, say:
    its queries and its one key are normed and rotated as those of attention are.
    """

    def __init__(self, config: ModelConfig, angles: Rope, sizes: Mapping[str, int]) -> None:
        super().__init__(config, angles, qk_norm="head", norm=CentredNorm)
        hidden, eps = config.require_int("hidden_size"), norm_eps(config)
        count, dim = sizes["heads"], sizes["dim"]
        self.index_q_proj = Linear(hidden, count * dim)
        self.index_k_proj = Linear(hidden, dim)
        self.index_q_norm = CentredNorm(dim, eps, count)
        self.index_k_norm = CentredNorm(dim, eps)
        self.index_q_rotary = Rotary(count, dim, angles.inv_freq, factor=angles.factor)
        self.index_k_rotary = Rotary(1, dim, angles.inv_freq, factor=angles.factor)
        self.index = IndexBlocks(**sizes)
        dense = self.attention
        self.attention = SparseAttention(
            dense.heads,
            dense.kv_heads,
            dense.head_dim,
            dense.v_dim,
            dense.scale,
            index_heads=count,
            index_block=sizes["index_block"],
            index_topk=sizes["index_topk"],
        )

    def mixed(self, x: Tensor, positions: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index_q = self.index_q_rotary(self.index_q_norm(self.index_q_proj(x)), positions)
        index_k = self.index_k_rotary(self.index_k_norm(self.index_k_proj(x)), positions)
        return self.attention(q, k, v, self.index(index_q, index_k))  # type: ignore[no-any-return]


def build(config: ModelConfig) -> nn.Module:
    """The model of the text part of a MiniMax-M3 config.json."""
    check_values(
        config,
        attention_output_gate=False,
        hidden_act="swigluoai",
        n_shared_experts=1,
        qk_norm_type="per_head",
        scoring_func="sigmoid",
        use_gemma_norm=True,
        use_qk_norm=True,
        use_routing_bias=True,
    )
    hidden, dim = config.require_int("hidden_size"), attention_heads(config)[2]
    share = config.get_int("rotary_dim", dim, minimum=2) / dim
    angles = rope(config, dim, default_theta=5e6, partial=share)
    sparse, routed = _sparse_layers(config), _routed_layers(config)
    sizes = _index_sizes(config, angles) if any(sparse) else {}
    alpha = config.get_float("swiglu_alpha", 1.702)
    act = gated(f"gate * sigmoid({alpha!r} * gate)", limit=_limit(config), plus=1.0)
    config = config.with_text(hidden_act="silu")  # what all MLPs have is said of each

    def mlp(key: str) -> GatedMLP:
        return GatedMLP(hidden, config.require_int(key, minimum=1), act=act)

    def layer(index: int) -> nn.Module:
        if sparse[index]:
            attention: nn.Module = ChoosingAttention(config, angles, sizes)
        else:
            attention = GroupedQueryAttention(config, angles, qk_norm="head", norm=CentredNorm)
        if not routed[index]:
            return DecoderLayer(config, attention, mlp("dense_intermediate_size"), norm=_norm)
        moe = biased_moe(
            config,
            config.require_int("intermediate_size", minimum=1),
            factor=config.get_float("routed_scaling_factor", 2.0),
            shared=mlp("shared_intermediate_size"),
        )
        moe.experts.act = act
        return DecoderLayer(config, attention, moe, norm=_norm)

    return CausalLM(config, layer, norm=_norm)


def _norm(config: ModelConfig) -> nn.Module:
    return CentredNorm(config.require_int("hidden_size"), norm_eps(config))


def _limit(config: ModelConfig) -> float:
    limit = config.get_float("swiglu_limit", 7.0)
    if limit <= 0:
        raise config.error("swiglu_limit", f"is {limit:g}, must be above 0")
    return limit


def _routed_layers(config: ModelConfig) -> tuple[bool, ...]:
    """Whether each layer has experts: 1 in `moe_layer_freq`, "sparse" in `mlp_layer_types`."""
    depth, kinds = config.require_int("num_hidden_layers"), config.get_strs("mlp_layer_types")
    if not kinds:
        return _flags(config, "moe_layer_freq", depth) or (True,) * depth
    if len(kinds) < depth or {*kinds} - {"dense", "sparse"}:
        wanted = f"must say dense or sparse for each of {depth} layers"
        raise config.error("mlp_layer_types", wanted)
    return tuple(kind == "sparse" for kind in kinds[:depth])


def _sparse_layers(config: ModelConfig) -> tuple[bool, ...]:
    """Whether each layer has an indexer: 1 in `sparse_attention_freq`, or its entry in
    `layer_types`."""
    depth, kinds = config.require_int("num_hidden_layers"), config.get_strs("layer_types")
    if kinds:
        if len(kinds) < depth or {*kinds} - {FULL, SPARSE}:
            raise config.error(
                "layer_types", f"must say {FULL} or {SPARSE} for each of {depth} layers"
            )
        return tuple(kind == SPARSE for kind in kinds[:depth])
    section = config.section(_SECTION)
    none = (False,) * depth
    return none if section is None else _flags(section, "sparse_attention_freq", depth) or none


def _flags(config: ModelConfig, key: str, depth: int) -> tuple[bool, ...]:
    found = config.get_ints(key)
    if found and (len(found) < depth or {*found} - {0, 1}):
        raise config.error(key, f"must say 0 or 1 for each of {depth} layers")
    return tuple(each == 1 for each in found[:depth])


def _index_sizes(config: ModelConfig, angles: Rope) -> dict[str, int]:
    """Arguments of `IndexBlocks`. Indexers that add values of their own are refused."""
    section = config.section(_SECTION) or config
    check_values(section, use_sparse_attention=True, sparse_score_type="max", sparse_init_block=0)
    depth = config.require_int("num_hidden_layers")
    disabled = _flags(section, "sparse_disable_index_value", depth) or (True,) * depth
    if any(not off for off, on in zip(disabled, _sparse_layers(config), strict=True) if on):
        raise section.unsupported("sparse_disable_index_value", "indexers without values alone")

    def size(name: str, flat: str, default: int, minimum: int = 1) -> int:
        found = config.get_int(flat, default, minimum=minimum)
        return section.get_int(name, found, minimum=minimum)

    rotated = 2 * len(angles.inv_freq)
    sizes = {
        "heads": size("sparse_num_index_heads", "index_n_heads", 4),
        "dim": size("sparse_index_dim", "index_head_dim", 128, minimum=rotated),
        "index_block": size("sparse_block_size", "index_block_size", 128),
        "index_topk": size("sparse_topk_blocks", "index_topk_blocks", 16),
        "local": size("sparse_local_block", "index_local_blocks", 1),
    }
    if sizes["index_block"] % 2:
        raise section.unsupported("sparse_block_size", "an even number of positions")
    if sizes["local"] > sizes["index_topk"]:
        raise section.error("sparse_local_block", "is more than sparse_topk_blocks")
    if attention_heads(config)[1] % sizes["heads"]:
        raise section.unsupported("sparse_num_index_heads", "a divisor of num_key_value_heads")
    return sizes


def _aside(config: ModelConfig) -> tuple[Aside, ...]:
    images = ("vision_tower", "multi_modal_projector", "patch_merge_mlp")
    return (
        *(Aside(f"{name}.*", NO_IMAGES) for name in images),
        *(Aside(f"{prefix}mtp.*", LOOKS_AHEAD) for prefix in ("", "*.")),
    )


FAMILIES = (
    Family(
        "minimax_m3_vl",
        build,
        "block-sparse attention with an indexer, norms with 1 + weight, part of each head rotated,"
        " bounded gates, sigmoid routing, a shared expert; text alone",
        ("MiniMaxAI/MiniMax-M3",),
        names=(
            (r"\.mlp\.(gate\.|experts\.|shared_experts\.|e_score)", r".block_sparse_moe.\1"),
            *W123,
            (r"^", "language_model."),
        ),
        aside=_aside,
    ),
)
