"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3 with indexers, which choose the `index_topk` positions that
attention reads. In GLM-5 layers may share the choice of an earlier one.

The publishers turn an indexer's queries and keys by a Hadamard matrix, which changes no product,
and round them to FP8 for speed; like transformers, hmc does neither.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from hmc.blocks import Index, Linear, Rotary
from hmc.checkpoint.config import ModelConfig
from hmc.models.deepseek_v3 import latent_model
from hmc.models.family import Aside, Family, look_ahead
from hmc.models.norms import LayerNorm
from hmc.models.rope import Rope

KEY_EPS = 1e-6
"""Epsilon of the norm of an indexer's keys, a constant of the architecture."""


class Latest:
    """What the latest indexer of a running model chose: that of the layers which share it."""

    chosen: Tensor

    def __call__(self, x: Tensor, q_latent: Tensor, positions: Tensor) -> Tensor:
        return self.chosen


class Indexer(nn.Module):
    """Projections and norm around `Index`, whose choice is the `latest`; neighbours are rotated as
    pairs where `interleaved`, the last columns of a head and not the first where `at_end`.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: Rope,
        latest: Latest,
        *,
        interleaved: bool,
        at_end: bool = False,
        eps: float = KEY_EPS,
    ) -> None:
        super().__init__()
        hidden, q_rank = config.require_int("hidden_size"), config.require_int("q_lora_rank")
        heads = config.require_int("index_n_heads", minimum=1)
        dim = config.require_int("index_head_dim", minimum=2 * len(rope.inv_freq))
        self.latest = latest
        self.wq_b = Linear(q_rank, heads * dim)
        self.wk = Linear(hidden, dim)
        self.k_norm = LayerNorm(dim, eps, bias=True)
        self.weights_proj = Linear(hidden, heads)
        start = dim - 2 * len(rope.inv_freq) if at_end else 0
        turn = partial(Rotary, interleaved=interleaved, factor=rope.factor, start=start)
        self.q_rotary = turn(heads, dim, rope.inv_freq)
        self.k_rotary = turn(1, dim, rope.inv_freq)
        self.index = Index(heads, dim, config.require_int("index_topk", minimum=1))

    def forward(self, x: Tensor, q_latent: Tensor, positions: Tensor) -> Tensor:
        q = self.q_rotary(self.wq_b(q_latent), positions)
        k = self.k_rotary(self.k_norm(self.wk(x)), positions)
        self.latest.chosen = self.index(q, k, self.weights_proj(x))
        return self.latest.chosen


def build(config: ModelConfig) -> nn.Module:
    """The model of a DeepSeek-V3.2 config.json: an indexer a layer, which rotates halves."""
    config.require_int("n_group")
    config.require_int("topk_group")
    latest = Latest()

    def indexer(rope: Rope, index: int) -> Indexer:
        return Indexer(config, rope, latest, interleaved=False)

    return latent_model(config, indexer=indexer)


def build_glm(config: ModelConfig) -> nn.Module:
    """The model of a GLM-5 config.json: some layers share the choice of an earlier one."""
    latest, shares = Latest(), sharing(config)
    pairs = config.get_bool("indexer_rope_interleave", True)

    def indexer(rope: Rope, index: int) -> Indexer | Latest:
        return latest if shares[index] else Indexer(config, rope, latest, interleaved=pairs)

    return latent_model(config, indexer=indexer)


def sharing(config: ModelConfig) -> list[bool]:
    """Whether each layer shares the choice of the latest one with an indexer: by `indexer_types`,
    by `index_topk_pattern`, or but for each `index_topk_freq`-th after the first few.
    """
    layers = config.require_int("num_hidden_layers")
    key = "indexer_types"
    kinds = config.get_strs(key)
    if not kinds and config.get_str("index_topk_pattern", ""):
        key = "index_topk_pattern"
        kinds = tuple(
            {"F": "full", "S": "shared"}.get(each, each) for each in config.require_str(key)
        )
    if not kinds:
        every = config.get_int("index_topk_freq", 1, minimum=1)
        first = config.get_int("index_skip_topk_offset", 2)
        return [max(index - first + 1, 0) % every > 0 for index in range(layers)]
    if len(kinds) < layers or {*kinds} - {"full", "shared"} or kinds[0] == "shared":
        raise config.error(
            key, f"must say full or shared for each of {layers} layers, of the first one full"
        )
    return [kinds[index] == "shared" for index in range(layers)]


def unused_indexers(config: ModelConfig) -> tuple[Aside, ...]:
    """Indexers of layers that share a choice."""
    return tuple(
        Aside(f"*.layers.{index}.self_attn.indexer.*", "an earlier layer chooses for this one")
        for index, shared in enumerate(sharing(config))
        if shared
    )


def aside(config: ModelConfig) -> tuple[Aside, ...]:
    """Layers that look ahead, and indexers of layers that share a choice."""
    return *unused_indexers(config), *look_ahead(config)


_NEEDS = (
    "latent attention to tokens that an indexer chooses, sigmoid routing in groups, shared experts"
)

FAMILIES = (
    Family("deepseek_v32", build, _NEEDS, ("deepseek-ai/DeepSeek-V3.2",), aside=look_ahead),
    Family(
        "glm_moe_dsa",
        build_glm,
        f"{_NEEDS}; layers share a choice",
        ("zai-org/GLM-5", "zai-org/GLM-5.1", "zai-org/GLM-5.2"),
        aside=aside,
    ),
)
