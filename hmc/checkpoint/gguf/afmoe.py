"""Trinity (AFMoE) as GGUF files name it. They do not say which layers see all tokens, every fourth,
nor that embeddings are scaled; in the published models both is so.
"""

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
    head_dim,
    shared_expert,
)


def _config(facts: Facts) -> Values:
    return {
        "model_type": "afmoe",
        "architectures": ["AfmoeForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_experts"),
        "score_func": gating(facts, default=2),
        "intermediate_size": facts.whole("feed_forward_length"),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "num_dense_layers": facts.whole("leading_dense_block_count", 0),
        "num_shared_experts": facts.whole("expert_shared_count", 0),
        "route_norm": facts.flag("expert_weights_norm", True),
        "route_scale": facts.number("expert_weights_scale", 1.0),
        "sliding_window": facts.whole("attention.sliding_window"),
        "global_attn_every_n_layers": 4,
        "mup_enabled": True,
    }


AFMOE = GgufFamily(
    _config,
    {
        **COMMON,
        **QK_NORMS,
        **experts(),
        **shared_expert("mlp.shared_experts"),
        "blk.{n}.attn_gate": LAYER + "self_attn.gate_proj",
        "blk.{n}.post_attention_norm": LAYER + "post_attention_layernorm",
        "blk.{n}.ffn_norm": LAYER + "pre_mlp_layernorm",
        "blk.{n}.post_ffw_norm": LAYER + "post_mlp_layernorm",
        "blk.{n}.ffn_gate_inp": LAYER + "mlp.router.gate",
        "blk.{n}.exp_probs_b.bias": LAYER + "mlp.expert_bias",
    },
)
