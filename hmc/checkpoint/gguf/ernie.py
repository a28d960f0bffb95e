"""ERNIE 4.5 as GGUF files name it."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    LAYER,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    head_dim,
    shared_expert,
)


def _config(facts: Facts) -> Values:
    return {
        "model_type": "ernie4_5_moe",
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        "moe_num_experts": facts.whole("expert_count"),
        "moe_k": facts.whole("expert_used_count"),
        "moe_num_shared_experts": facts.whole("expert_shared_count", 0),
        "moe_layer_start_index": facts.whole("leading_dense_block_count", 0),
        "moe_layer_interval": facts.whole("interleave_moe_layer_step", 1),
        "intermediate_size": facts.whole("feed_forward_length"),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
    }


ERNIE_4_5_MOE = GgufFamily(
    _config,
    {
        **COMMON,
        **experts(),
        **shared_expert("mlp.shared_experts"),
        "blk.{n}.exp_probs_b.bias": LAYER + "mlp.moe_statics.e_score_correction_bias",
    },
)
