"""GLM-4.5 to 4.7 and dots.llm1 as GGUF files name them. Solar Open's files are called GLM's, and
differ from them in nothing but what metadata and tensors tell.
"""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    GROUPED,
    LAYER,
    QK_NORMS,
    Facts,
    GgufFamily,
    Values,
    common_config,
    grouped_config,
    head_dim,
    rotated_head_dim,
    sigmoid_alone,
)


def _config(facts: Facts) -> Values:
    return {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        **common_config(facts),
        **rotated_head_dim(facts),
        **grouped_config(facts, sigmoid_alone(facts)),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in facts.tensors,
    }


def _dots1(facts: Facts) -> Values:
    return {
        "model_type": "dots1",
        "architectures": ["Dots1ForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **grouped_config(facts, sigmoid_alone(facts)),
    }


GLM4_MOE = GgufFamily(
    _config,
    {
        **COMMON,
        **QK_NORMS,
        **GROUPED,
        "blk.{n}.post_attention_norm": LAYER + "post_attention_layernorm",
    },
)
DOTS1 = GgufFamily(_dots1, {**COMMON, **QK_NORMS, **GROUPED})
