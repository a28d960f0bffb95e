"""Sarvam-30B as GGUF files name it: the architecture of Ling 2, all of each head rotated. The
converter takes from each bias of experts their mean, which changes no choice.
"""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    GROUPED,
    LAYER,
    Facts,
    GgufFamily,
    Values,
    common_config,
    grouped_config,
    head_dim,
    sigmoid_alone,
)


def _config(facts: Facts) -> Values:
    return {
        "model_type": "sarvam_moe",
        "architectures": ["SarvamMoEForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **grouped_config(facts, sigmoid_alone(facts)),
        "attention_bias": "blk.0.attn_qkv.bias" in facts.tensors,
    }


BAILING_MOE2 = GgufFamily(
    _config,
    {
        **COMMON,
        **GROUPED,
        "token_embd": "model.word_embeddings",
        "blk.{n}.attn_qkv": LAYER + "attention.query_key_value",
        "blk.{n}.attn_output": LAYER + "attention.dense",
        "blk.{n}.attn_q_norm": LAYER + "attention.query_layernorm",
        "blk.{n}.attn_k_norm": LAYER + "attention.key_layernorm",
        "blk.{n}.exp_probs_b.bias": LAYER + "mlp.gate.expert_bias",
    },
)
