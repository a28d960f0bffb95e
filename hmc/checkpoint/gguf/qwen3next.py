"""Qwen3-Next and Qwen3.5 as GGUF files name them. Their norms are those of published files plus 1;
q, k and v of delta nets lie in one tensor, z in another. Of Qwen3.5, heads of values that share one
of keys lie as far apart as there are heads of keys.
"""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    APART,
    COMMON,
    LAYER,
    QK_NORMS,
    Facts,
    GgufFamily,
    Names,
    Values,
    common_config,
    experts,
    experts_config,
    renamed,
    rotated_head_dim,
    shared_expert,
)
from hmc.checkpoint.gguf.states import attending, has_any, head_of_values, state_names


def _qwen3_next(facts: Facts) -> Values:
    """Files of 2025 have z beside q, k and v, as published."""
    parts = ["qkvz", "ba"] if has_any(facts, ".ssm_in.weight") else ["ba"]
    return {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        **_config(facts),
        "mlp_only_layers": facts.layers_without("ffn_gate_inp.weight"),
        "grouped_projections": parts,
    }


def _qwen3_5(facts: Facts) -> Values:
    return {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        **_config(facts),
    }


def _config(facts: Facts) -> Values:
    return {
        **common_config(facts),
        **rotated_head_dim(facts),
        **experts_config(facts, "num_experts"),
        **APART,
        "attention_bias": False,
        "zero_centered": False,
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "shared_expert_intermediate_size": facts.whole("expert_shared_feed_forward_length"),
        "intermediate_size": facts.whole("feed_forward_length", 0),
        "norm_topk_prob": facts.flag("expert_weights_norm", True),
        "layer_types": [f"{'full' if each else 'linear'}_attention" for each in attending(facts)],
        "linear_num_value_heads": facts.whole("ssm.time_step_rank"),
        "linear_value_head_dim": head_of_values(facts),
        "linear_num_key_heads": facts.whole("ssm.group_count"),
        "linear_key_head_dim": facts.whole("ssm.state_size"),
        "linear_conv_kernel_dim": facts.whole("ssm.conv_kernel"),
    }


_NET = LAYER + "linear_attn."
_NAMES: Names = {
    **COMMON,
    **QK_NORMS,
    **experts(),
    **shared_expert("mlp.shared_expert"),
    **state_names(_NET),
    "blk.{n}.post_attention_norm": LAYER + "post_attention_layernorm",
    "blk.{n}.ffn_gate_inp_shexp": LAYER + "mlp.shared_expert_gate",
    "blk.{n}.attn_qkv": _NET + "in_proj_qkv",
    "blk.{n}.attn_gate": _NET + "in_proj_z",
    "blk.{n}.ssm_in": _NET + "in_proj_qkvz",
    "blk.{n}.ssm_ba": _NET + "in_proj_ba",
    "blk.{n}.ssm_alpha": _NET + "in_proj_a",
    "blk.{n}.ssm_beta": _NET + "in_proj_b",
}

QWEN3_NEXT = GgufFamily(_qwen3_next, _NAMES)
QWEN35_MOE = GgufFamily(_qwen3_5, renamed(_NAMES, "model.", "model.language_model."))
