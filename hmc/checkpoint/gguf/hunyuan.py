"""Hunyuan-A13B as GGUF files name it. The base of frequencies that they say is the scaled one."""

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
        "model_type": "hunyuan_v1_moe",
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        "num_experts": facts.whole("expert_count"),
        "moe_topk": facts.whole("expert_used_count"),
        "num_shared_expert": facts.whole("expert_shared_count", 1),
        "intermediate_size": facts.whole("feed_forward_length"),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
    }


HUNYUAN_MOE = GgufFamily(
    _config,
    {
        **COMMON,
        **experts(),
        **shared_expert("mlp.shared_mlp"),
        "blk.{n}.ffn_gate_inp": LAYER + "mlp.gate.wg",
        "blk.{n}.attn_q_norm": LAYER + "self_attn.query_layernorm",
        "blk.{n}.attn_k_norm": LAYER + "self_attn.key_layernorm",
    },
)
