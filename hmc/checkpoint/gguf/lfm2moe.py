"""LFM2 MoE as GGUF files name it. Their last norm is called that of the embeddings."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    LAYER,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    head_dim,
    sigmoid_alone,
)
from hmc.checkpoint.gguf.states import attending, has_any, kv_heads


def _config(facts: Facts) -> Values:
    sigmoid_alone(facts)
    kinds = ["full_attention" if each else "conv" for each in attending(facts)]
    return {
        "model_type": "lfm2_moe",
        "architectures": ["Lfm2MoeForCausalLM"],
        **common_config(facts, kv_heads(facts)),
        **head_dim(facts),
        **experts_config(facts, "num_experts"),
        "layer_types": kinds,
        "intermediate_size": facts.whole("feed_forward_length", 0),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "num_dense_layers": facts.whole("leading_dense_block_count", 0),
        "norm_topk_prob": facts.flag("expert_weights_norm", True),
        "routed_scaling_factor": facts.number("expert_weights_scale", 1.0),
        "use_expert_bias": has_any(facts, ".exp_probs_b.bias"),
        "conv_bias": has_any(facts, ".shortconv.conv.bias"),
        "conv_L_cache": facts.whole("shortconv.l_cache"),
    }


_FEED = LAYER + "feed_forward."
_CONV = LAYER + "conv."

LFM2_MOE = GgufFamily(
    _config,
    {
        **COMMON,
        **experts("feed_forward.", "w1", "w3", "w2"),
        "token_embd_norm": "model.embedding_norm",
        "blk.{n}.attn_norm": LAYER + "operator_norm",
        "blk.{n}.ffn_norm": LAYER + "ffn_norm",
        "blk.{n}.attn_output": LAYER + "self_attn.out_proj",
        "blk.{n}.attn_q_norm": LAYER + "self_attn.q_layernorm",
        "blk.{n}.attn_k_norm": LAYER + "self_attn.k_layernorm",
        "blk.{n}.shortconv.conv": _CONV + "conv",
        "blk.{n}.shortconv.in_proj": _CONV + "in_proj",
        "blk.{n}.shortconv.out_proj": _CONV + "out_proj",
        "blk.{n}.ffn_gate": _FEED + "w1",
        "blk.{n}.ffn_up": _FEED + "w3",
        "blk.{n}.ffn_down": _FEED + "w2",
        "blk.{n}.exp_probs_b.bias": _FEED + "expert_bias",
    },
)
