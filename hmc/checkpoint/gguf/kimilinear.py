"""Kimi Linear as GGUF files name it: delta attention beside latent attention (deepseek2.py)."""

from __future__ import annotations

from math import prod

from hmc.checkpoint.gguf.deepseek2 import LATENT_NAMES, head_of
from hmc.checkpoint.gguf.families import (
    APART,
    LAYER,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    shared_expert,
)
from hmc.checkpoint.gguf.states import attending, state_names


def _config(facts: Facts) -> Values:
    rotated = facts.whole("rope.dimension_count")
    return {
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        **common_config(facts, facts.whole("attention.head_count")),
        **experts_config(facts, "num_experts"),
        **APART,
        "num_experts_per_token": facts.whole("expert_used_count"),
        "num_shared_experts": facts.whole("expert_shared_count", 0),
        "first_k_dense_replace": facts.whole("leading_dense_block_count", 0),
        "intermediate_size": facts.whole("feed_forward_length", 0),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "moe_renormalize": facts.flag("expert_weights_norm", True),
        "routed_scaling_factor": facts.number("expert_weights_scale", 1.0),
        "kv_lora_rank": facts.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": head_of(facts, "key") - rotated,
        "v_head_dim": head_of(facts, "value"),
        "mla_use_nope": True,
        "linear_attn_config": _linear(facts),
    }


def _linear(facts: Facts) -> Values:
    """Layers are counted from 1; that delta attention has as many heads as the other no key says,
    its rates do.
    """
    full = attending(facts, "attn_kv_a_mqa.weight")
    rates = next((shape for name, shape in facts.tensors.items() if name.endswith(".ssm_a")), ())
    return {
        "full_attn_layers": [n + 1 for n, each in enumerate(full) if each],
        "kda_layers": [n + 1 for n, each in enumerate(full) if not each],
        "num_heads": prod(rates),
        "head_dim": facts.whole("kda.head_dim"),
        "short_conv_kernel_size": facts.whole("ssm.conv_kernel"),
    }


_MIXER = LAYER + "self_attn."
_LOW_RANK = ("f_a", "f_b", "g_a", "g_b")
_MLP = "block_sparse_moe."

KIMI_LINEAR = GgufFamily(
    _config,
    {
        **LATENT_NAMES,
        **experts(_MLP, "w1", "w3", "w2"),
        **shared_expert(_MLP + "shared_experts"),
        **state_names(_MIXER),
        **{f"blk.{{n}}.ssm_conv1d_{part}": f"{_MIXER}{part}_conv1d" for part in "qkv"},
        **{f"blk.{{n}}.ssm_{part}": f"{_MIXER}{part}_proj" for part in _LOW_RANK},
        "blk.{n}.ssm_beta": _MIXER + "b_proj",
        "blk.{n}.ssm_norm": _MIXER + "o_norm",
        "blk.{n}.exp_probs_b.bias": LAYER + _MLP + "gate.e_score_correction_bias",
    },
)
