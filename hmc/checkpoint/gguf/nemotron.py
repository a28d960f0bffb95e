"""Nemotron-H with experts (Nemotron 3) as GGUF files name it: what a layer is its tensors tell."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    APART,
    COMMON,
    Facts,
    GgufFamily,
    Values,
    common_config,
    head_dim,
)
from hmc.checkpoint.gguf.states import by_groups, has_any, head_of_values, kv_heads, state_names

_KINDS = {"ssm_in": "mamba", "attn_q": "attention", "ffn_gate_inp": "moe", "ffn_up": "mlp"}
"""Kinds of layers by a tensor that others have not."""


def _config(facts: Facts) -> Values:
    kinds = ["" for _ in range(facts.layers)]
    for tensor, kind in _KINDS.items():
        without = facts.layers_without(f"{tensor}.weight")
        kinds = [each if n in without else kind for n, each in enumerate(kinds)]
    dense = next((f"blk.{n}.ffn_up.weight" for n, each in enumerate(kinds) if each == "mlp"), "")
    return {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        **common_config(facts, kv_heads(facts)),
        **head_dim(facts),
        **_experts(facts),
        **APART,
        "layers_block_type": kinds,
        "attention_bias": has_any(facts, ".attn_q.bias"),
        "intermediate_size": facts.tensors[dense][0] if dense else 0,
        "mlp_bias": has_any(facts, ".ffn_up_shexp.bias"),
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": facts.whole("ssm.time_step_rank"),
        "mamba_head_dim": head_of_values(facts),
        "n_groups": facts.whole("ssm.group_count"),
        "ssm_state_size": facts.whole("ssm.state_size"),
        "conv_kernel": facts.whole("ssm.conv_kernel"),
        "mamba_hidden_act": "silu",
        "use_bias": has_any(facts, ".ssm_in.bias"),
        "use_conv_bias": has_any(facts, ".ssm_conv1d.bias"),
    }


def _experts(facts: Facts) -> Values:
    """Their widths are those of layers, of which `feed_forward_length` is 0 for others."""
    shared = facts.whole("expert_shared_feed_forward_length")
    return {
        "n_routed_experts": facts.whole("expert_count"),
        "num_experts_per_tok": facts.whole("expert_used_count"),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": shared,
        "moe_latent_size": facts.whole("moe_latent_size", 0),
        "n_shared_experts": facts.whole("expert_shared_count", 1),
        "n_group": facts.whole("expert_group_count", 1),
        "topk_group": facts.whole("expert_group_used_count", 1),
        "norm_topk_prob": facts.flag("expert_weights_norm", True),
        "routed_scaling_factor": facts.number("expert_weights_scale", 1.0),
    }


_LAYER = "backbone.layers.{n}."
_MIXER = _LAYER + "mixer."

NEMOTRON_H_MOE = GgufFamily(
    _config,
    {
        **{key: name for key, name in COMMON.items() if ".nextn." in key},
        **state_names(_MIXER),
        **by_groups(_MIXER),
        "token_embd": "backbone.embeddings",
        "output_norm": "backbone.norm_f",
        "output": "lm_head",
        "blk.{n}.attn_norm": _LAYER + "norm",
        "blk.{n}.attn_q": _MIXER + "q_proj",
        "blk.{n}.attn_k": _MIXER + "k_proj",
        "blk.{n}.attn_v": _MIXER + "v_proj",
        "blk.{n}.attn_output": _MIXER + "o_proj",
        "blk.{n}.ffn_up": _MIXER + "up_proj",
        "blk.{n}.ffn_down": _MIXER + "down_proj",
        "blk.{n}.ffn_gate_inp": _MIXER + "gate",
        "blk.{n}.exp_probs_b.bias": _MIXER + "gate.e_score_correction_bias",
        "blk.{n}.ffn_up_exps": _MIXER + "experts.{e}.up_proj",
        "blk.{n}.ffn_down_exps": _MIXER + "experts.{e}.down_proj",
        "blk.{n}.ffn_up_shexp": _MIXER + "shared_experts.up_proj",
        "blk.{n}.ffn_down_shexp": _MIXER + "shared_experts.down_proj",
        "blk.{n}.ffn_latent_down": _MIXER + "fc1_latent_proj",
        "blk.{n}.ffn_latent_up": _MIXER + "fc2_latent_proj",
        "blk.{n}.ffn_norm": _LAYER + "ffn_norm",  # of the layer that looks ahead
    },
)
