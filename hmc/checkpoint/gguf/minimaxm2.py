"""MiniMax-M2 to M2.7 as GGUF files name them."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    LAYER,
    QK_NORMS,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    gating,
    rotated_head_dim,
)


def _config(facts: Facts) -> Values:
    return {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        **common_config(facts),
        **rotated_head_dim(facts),
        **experts_config(facts, "num_local_experts"),
        "rotary_dim": facts.whole("rope.dimension_count"),
        "intermediate_size": facts.whole("expert_feed_forward_length"),
        "scoring_func": gating(facts, default=2),
    }


MINIMAX_M2 = GgufFamily(
    _config,
    {
        **COMMON,
        **QK_NORMS,
        **experts("block_sparse_moe.", "w1", "w3", "w2"),
        "blk.{n}.exp_probs_b.bias": LAYER + "block_sparse_moe.e_score_correction_bias",
    },
)
