"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3 with an indexer, which chooses the `index_topk` tokens that
attention reads; up to so many tokens of context it chooses all, and is left aside.
"""

from __future__ import annotations

from hmc.checkpoint.config import ModelConfig
from hmc.models.deepseek_v3 import latent_model
from hmc.models.family import Aside, Family, Limit, look_ahead


def aside(config: ModelConfig) -> tuple[Aside, ...]:
    """The indexers, and layers that look ahead."""
    reason = f"chooses among more than {config.require_int('index_topk')} tokens"
    return *look_ahead(config), Aside("*.self_attn.indexer.*", reason)


def limit(config: ModelConfig) -> Limit:
    """As many tokens as attention reads."""
    tokens = config.require_int("index_topk", minimum=1)
    return Limit(tokens, "index_topk: beyond it attention is sparse, which hmc does not compute")


_NEEDS = "latent attention, sigmoid routing in groups, shared experts; context up to index_topk"

FAMILIES = tuple(
    Family(name, latent_model, _NEEDS, published, aside=aside, limit=limit)
    for name, published in (
        ("deepseek_v32", ("deepseek-ai/DeepSeek-V3.2",)),
        ("glm_moe_dsa", ("zai-org/GLM-5", "zai-org/GLM-5.1")),
    )
)
