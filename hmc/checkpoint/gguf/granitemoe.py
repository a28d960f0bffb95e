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
    Names,
    Values,
    common_config,
    experts,
    head_dim,
    shared_expert,
)


def granite_config(facts: Facts, kv_heads: int = 0) -> Values:
    """What all of Granite say, those with `kv_heads` in some layers alone too."""
    shared = facts.whole("expert_shared_feed_forward_length", 0)
    return {
        "model_type": "granitemoeshared" if shared else "granitemoe",
        "architectures": [f"GraniteMoe{'Shared' if shared else ''}ForCausalLM"],
        **common_config(facts, kv_heads),
        **head_dim(facts),
        "num_local_experts": facts.whole("expert_count", 0),
        "num_experts_per_tok": facts.whole("expert_used_count", 0),
        "intermediate_size": facts.whole("feed_forward_length"),
        "shared_intermediate_size": shared,
        "attention_multiplier": facts.number("attention.scale", 1.0),
        "embedding_multiplier": facts.number("embedding_scale", 1.0),
        "residual_multiplier": facts.number("residual_scale", 1.0),
        "logits_scaling": facts.number("logit_scale", 1.0),
        "rope_interleave": True,
        **APART,
    }


NAMES: Names = {
    **COMMON,
    **experts(),
    **shared_expert("shared_mlp"),
    "blk.{n}.ffn_gate_inp": LAYER + "block_sparse_moe.router.layer",
    "blk.{n}.ffn_down_shexp": LAYER + "shared_mlp.output_linear",
}

GRANITE_MOE = GgufFamily(granite_config, NAMES)
