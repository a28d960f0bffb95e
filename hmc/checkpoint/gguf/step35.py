"""Step-3.5 as GGUF files name it. Their norms are those of published files plus 1; that full layers
turn half of each head they do not say.
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
    gating,
    layer_types,
    mlp_types,
    renamed,
    shared_expert,
)
from hmc.checkpoint.gguf.rope import FACTORS, llama3


def _config(facts: Facts) -> Values:
    slides = facts.slides()
    heads, kv_heads = (
        dict(zip(slides, facts.by_layer(f"attention.{key}"), strict=True))
        for key in ("head_count", "head_count_kv")
    )
    bases = facts.number("rope.freq_base"), facts.number("rope.freq_base_swa")
    routed = [index for index, kind in enumerate(mlp_types(facts)) if kind == "sparse"]
    other = {
        "num_attention_heads": heads.get(1, 1),
        "num_attention_groups": kv_heads.get(1, 1),
    }
    return {
        "model_type": "step3p5",
        "architectures": ["Step3p5ForCausalLM"],
        **common_config(facts, kv_heads.get(0, 1), heads.get(0, 1)),
        **llama3(facts, 1.0, 32.0, 131072),
        "num_attention_groups": kv_heads.get(0, 1),
        "head_dim": facts.whole("attention.key_length"),
        "attention_other_setting": other,
        "zero_centered": False,
        "sliding_window": facts.whole("attention.sliding_window"),
        "layer_types": layer_types(slides),
        "rope_theta": [bases[each] for each in slides],
        "partial_rotary_factors": [1.0 if each else 0.5 for each in slides],
        "intermediate_size": facts.whole("feed_forward_length"),
        "moe_layers_enum": routed,
        "moe_num_experts": facts.whole("expert_count"),
        "moe_top_k": facts.whole("expert_used_count"),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "share_expert_dim": facts.whole("expert_shared_feed_forward_length"),
        "moe_router_activation": gating(facts, default=2),
        "moe_router_scaling_factor": facts.number("expert_weights_scale", 1.0),
        "norm_expert_weight": facts.flag("expert_weights_norm", True),
        "swiglu_limits": facts.numbers("swiglu_clamp_exp"),
        "swiglu_limits_shared": facts.numbers("swiglu_clamp_shexp"),
    }


STEP35 = GgufFamily(
    _config,
    {
        **COMMON,
        **QK_NORMS,
        **renamed(experts("moe."), ".experts.", "."),
        **shared_expert("share_expert"),
        "blk.{n}.attn_gate": LAYER + "self_attn.g_proj",
        "blk.{n}.exp_probs_b.bias": LAYER + "moe.router_bias",
    },
    settings=(FACTORS,),
)
