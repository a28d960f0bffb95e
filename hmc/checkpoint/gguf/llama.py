"""Mixtral as GGUF files name it: the architecture "llama", with experts.

Its converter put the rows of q and k in another order, so that the elements a rotation pairs lie
side by side; the model then rotates neighbours. No row has to be moved back.
"""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    head_dim,
)
from hmc.errors import UnsupportedError


def _config(facts: Facts) -> Values:
    if not facts.whole("expert_count", 0):
        raise UnsupportedError(
            f"{facts.settings.path}: a llama without experts; of these hmc reads Mixtral alone"
        )
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_local_experts"),
        "intermediate_size": facts.whole("feed_forward_length"),
        "rope_interleave": True,
    }


LLAMA = GgufFamily(_config, {**COMMON, **experts("block_sparse_moe.", "w1", "w3", "w2")})
