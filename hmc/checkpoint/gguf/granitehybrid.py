"""Granite 4 with Mamba 2 layers as GGUF files name it: the others are Granite MoE's
(granitemoe.py).
"""

from __future__ import annotations

from hmc.checkpoint.gguf.families import LAYER, Facts, GgufFamily, Values
from hmc.checkpoint.gguf.granitemoe import NAMES, granite_config
from hmc.checkpoint.gguf.states import (
    attending,
    by_groups,
    has_any,
    head_of_values,
    kv_heads,
    state_names,
)

_MAMBA = LAYER + "mamba."


def _config(facts: Facts) -> Values:
    inner = facts.whole("ssm.inner_size")
    turned = facts.flag("rope.scaling.finetuned", False)
    return {
        **granite_config(facts, kv_heads(facts)),
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "attention_bias": has_any(facts, ".attn_q.bias"),
        "layer_types": ["attention" if each else "mamba" for each in attending(facts)],
        "position_embedding_type": "rope" if turned else "nope",
        "mamba_expand": inner // (facts.whole("embedding_length") or 1),
        "mamba_n_heads": facts.whole("ssm.time_step_rank"),
        "mamba_d_head": head_of_values(facts),
        "mamba_n_groups": facts.whole("ssm.group_count"),
        "mamba_d_state": facts.whole("ssm.state_size"),
        "mamba_d_conv": facts.whole("ssm.conv_kernel"),
        "mamba_proj_bias": has_any(facts, ".ssm_in.bias"),
        "mamba_conv_bias": has_any(facts, ".ssm_conv1d.bias"),
    }


GRANITE_HYBRID = GgufFamily(
    _config,
    {
        **NAMES,
        **state_names(_MAMBA),
        **by_groups(_MAMBA),
        # Without experts.
        "blk.{n}.ffn_gate": LAYER + "shared_mlp.gate_proj",
        "blk.{n}.ffn_up": LAYER + "shared_mlp.up_proj",
        "blk.{n}.ffn_down": LAYER + "shared_mlp.output_linear",
    },
)
