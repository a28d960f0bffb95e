"""Granite MoE as GGUF files name it. What lies in one tensor as published, gate and up, is apart in
them, and rows of q and k are moved as Mixtral's are (llama.py).
"""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    APART,
    COMMON,
    LAYER,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    head_dim,
    shared_expert,
)


def _config(facts: Facts) -> Values:
    shared = facts.whole("expert_shared_feed_forward_length", 0)
    return {
        "model_type": "granitemoeshared" if shared else "granitemoe",
        "architectures": [f"GraniteMoe{'Shared' if shared else ''}ForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_local_experts"),
        "intermediate_size": facts.whole("feed_forward_length"),
        "shared_intermediate_size": shared,
        "attention_multiplier": facts.number("attention.scale", 1.0),
        "embedding_multiplier": facts.number("embedding_scale", 1.0),
        "residual_multiplier": facts.number("residual_scale", 1.0),
        "logits_scaling": facts.number("logit_scale", 1.0),
        "rope_interleave": True,
        **APART,
    }


GRANITE_MOE = GgufFamily(
    _config,
    {
        **COMMON,
        **experts(),
        **shared_expert("shared_mlp"),
        "blk.{n}.ffn_gate_inp": LAYER + "block_sparse_moe.router.layer",
        "blk.{n}.ffn_down_shexp": LAYER + "shared_mlp.output_linear",
    },
)
