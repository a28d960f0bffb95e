"""GLM-5.3: delta attention with bounded decays a channel; every few layers latent attention that
knows no positions, to pools of them that an indexer chooses. Several residual streams, mixed when a
layer writes, of which the last norm reads the mean; bounded activations, sigmoid routing.
"""

from __future__ import annotations

from torch import Tensor, nn

from hmc.blocks import Experts, GatedMLP, IndexPools, Linear
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import ACTIVATIONS, gated
from hmc.models.common import CausalLM, check_values, norm_eps
from hmc.models.deepseek_v32 import KEY_EPS, sharing
from hmc.models.delta import Heads, KimiDeltaNet
from hmc.models.family import LANGUAGE_MODEL, NO_IMAGES, Aside, Family, look_ahead
from hmc.models.latent import LatentAttention
from hmc.models.norms import LayerNorm
from hmc.models.routing import dense_mlp, grouped_moe, is_routed
from hmc.models.streams import Half, MeanRead, StreamLayer, spread

_LINEAR = "linear_attention"
_FULL = ("full_attention", "indexed_attention", "deepseek_sparse_attention")
"""What published configurations and transformers call the other layers."""


class PoolIndexer(nn.Module):
    """Projections and norm around `IndexPools`."""

    def __init__(self, config: ModelConfig, pool: int) -> None:
        super().__init__()
        hidden, rank = config.require_int("hidden_size"), config.require_int("q_lora_rank")
        heads = config.require_int("index_n_heads", minimum=1)
        dim = config.require_int("index_head_dim", minimum=pool)
        most = config.require_int("index_topk", minimum=pool)
        if most % pool:
            raise config.error("index_topk", f"is {most}, must be whole pools of {pool}")
        self.wq_b = Linear(rank, heads * dim)
        self.wk = Linear(hidden, dim)
        self.k_norm = LayerNorm(dim, KEY_EPS, bias=True)
        self.index_kpool_compress_gate = Linear(hidden, dim, plain=True)
        self.weights_proj = Linear(hidden, heads)
        self.index = IndexPools(heads, dim, most, pool, "index_kpool_compress_ape")

    def forward(self, x: Tensor, q_latent: Tensor, positions: Tensor) -> Tensor:
        k, gate = self.k_norm(self.wk(x)), self.index_kpool_compress_gate(x)
        return self.index(self.wq_b(q_latent), k, gate, self.weights_proj(x))  # type: ignore[no-any-return]


def build(config: ModelConfig) -> nn.Module:
    """The model of the text part of a GLM-5.3 config.json."""
    check_values(
        config,
        attention_bias=False,
        hidden_act="silu",
        index_kpool_always_select_tail=True,
        mla_use_nope=True,
        qk_rope_head_dim=0,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
    )
    if any(sharing(config)):
        raise config.unsupported("indexer_types", "full for every layer")
    hidden, eps = config.require_int("hidden_size"), norm_eps(config)
    act = gated(ACTIVATIONS["silu"], limit=config.get_float("swiglu_limit", 10.0))
    pool = config.get_int("index_kpool", 16, minimum=2)
    kinds, (heads, lower) = _kinds(config), _linear_attention(config)

    def layer(index: int) -> nn.Module:
        if kinds[index]:
            mixer: nn.Module = KimiDeltaNet(hidden, heads, eps, low_rank=True, lower=lower)
        else:
            indexer = PoolIndexer(config, pool)
            mixer = LatentAttention(config, None, indexer=indexer, pool=pool, eps=eps)
        mlp = grouped_moe(config, factor=2.5) if is_routed(config, index, 3) else dense_mlp(config)
        for module in mlp.modules():
            if isinstance(module, GatedMLP | Experts):
                module.act = act
        return StreamLayer(Half(config, mixer), Half(config, mlp))

    return CausalLM(config, layer, hyper=(spread(config), MeanRead(config)))


def _kinds(config: ModelConfig) -> list[bool]:
    """Whether each layer has linear attention: as `linear_attn_config` says, which counts from 0,
    or `layer_types`, else all but each fourth.
    """
    depth = config.require_int("num_hidden_layers")
    section = config.section("linear_attn_config")
    if section is not None and "kda_layers" in section:
        linear = {*section.get_ints("kda_layers")}
        full = {*section.get_ints("full_attn_layers")} or {*range(depth)} - linear
        if linear & full or not {*range(depth)} <= linear | full:
            raise section.error("kda_layers", f"and full_attn_layers must share {depth} layers")
        return [index in linear for index in range(depth)]
    kinds = config.get_strs("layer_types")
    if kinds and (len(kinds) < depth or {*kinds} - {_LINEAR, *_FULL}):
        names = ", ".join((_LINEAR, *_FULL))
        raise config.error("layer_types", f"must say one of {names} for each of {depth} layers")
    return [kinds[index] == _LINEAR if kinds else index % 4 != 3 for index in range(depth)]


_SIZES = (
    ("num_heads", "linear_num_heads", 64),
    ("head_dim", "linear_head_dim", 128),
    ("short_conv_kernel_size", "linear_conv_kernel_dim", 4),
)
"""Of linear attention: keys in its section, keys beside it, and what both default to."""


def _linear_attention(config: ModelConfig) -> tuple[Heads, float | None]:
    """Heads of linear attention, and the bound of their decays' logarithms."""
    section, sizes = config.section("linear_attn_config"), []
    bound = config.get_float("linear_lower_bound", -5.0)
    lower: float | None = bound
    for key, beside, default in _SIZES:
        size = config.get_int(beside, default, minimum=1)
        sizes.append(size if section is None else section.get_int(key, size, minimum=1))
    if section is not None:
        bounded = "gate_lower_bound" in section or section.get_bool("safe_gate", True)
        lower = section.get_float("gate_lower_bound", bound) if bounded else None
    count, dim, taps = sizes
    return Heads(count, count, dim, dim, taps), lower


def _aside(config: ModelConfig) -> tuple[Aside, ...]:
    return Aside("model.visual.*", NO_IMAGES), *look_ahead(config)


FAMILIES = (
    Family(
        "glm5_next",
        build,
        "delta attention by channels, latent attention without rope to pools of tokens that an"
        " indexer chooses; hyper-connections, bounded gates, sigmoid routing, shared experts; text"
        " alone",
        ("zai-org/GLM-5.3-Flash",),
        names=(
            (r"\.(attn|ffn)\.hc\.(fn|base|scale)(\.weight)?$", r".hc_\1_\2"),
            (r"\.attn\.norm\.", ".input_layernorm."),
            (r"\.ffn\.norm\.", ".post_attention_layernorm."),
            (r"\.attn\.inner\.", ".self_attn."),
            (r"\.ffn\.inner\.", ".mlp."),
            (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.self_attn\.norm\.", ".self_attn.o_norm."),
            (r"\.index_kpool_compress_gate\.weight$", ".index_kpool_compress_gate"),
            *LANGUAGE_MODEL,
        ),
        aside=_aside,
    ),
)
