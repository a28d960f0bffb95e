"""Jamba as GGUF files name it."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    APART,
    COMMON,
    LAYER,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
)
from hmc.checkpoint.gguf.states import attending, has_any, kv_heads, state_names
from hmc.errors import UnsupportedError


def _config(facts: Facts) -> Values:
    dense = facts.layers_without("ffn_gate_inp.weight")
    return {
        "model_type": "jamba",
        "architectures": ["JambaForCausalLM"],
        **common_config(facts, kv_heads(facts)),
        **experts_config(facts, "num_experts"),
        **APART,
        **_every(facts, "attn_layer", attending(facts)),
        **_every(facts, "expert_layer", [n not in dense for n in range(facts.layers)]),
        "intermediate_size": facts.whole("feed_forward_length"),
        "mamba_expand": facts.whole("ssm.inner_size") // (facts.whole("embedding_length") or 1),
        "mamba_d_conv": facts.whole("ssm.conv_kernel"),
        "mamba_d_state": facts.whole("ssm.state_size"),
        "mamba_dt_rank": facts.whole("ssm.time_step_rank"),
        "mamba_conv_bias": has_any(facts, ".ssm_conv1d.bias"),
        "mamba_proj_bias": has_any(facts, ".ssm_in.bias"),
    }


def _every(facts: Facts, kind: str, those: list[bool]) -> Values:
    """Which layers are of a kind: one of so many."""
    places = [n for n, each in enumerate(those) if each]
    first = places[0] if places else len(those)
    period = places[1] - first if len(places) > 1 else max(len(those), first + 1)
    if places != list(range(first, len(those), period)):
        raise UnsupportedError(f"{facts.settings.path}: layers {places} are no {kind}_period apart")
    return {f"{kind}_offset": first, f"{kind}_period": period}


_MAMBA = LAYER + "mamba."
_FEED = LAYER + "feed_forward."

JAMBA = GgufFamily(
    _config,
    {
        **COMMON,
        **experts("feed_forward."),
        **state_names(_MAMBA),
        "output_norm": "model.final_layernorm",
        "blk.{n}.ffn_norm": LAYER + "pre_ff_layernorm",
        "blk.{n}.ssm_x": _MAMBA + "x_proj",
        "blk.{n}.ssm_dt": _MAMBA + "dt_proj",
        "blk.{n}.ssm_dt.bias": _MAMBA + "dt_proj.bias",
        "blk.{n}.ssm_dt_norm": _MAMBA + "dt_layernorm",
        "blk.{n}.ssm_b_norm": _MAMBA + "b_layernorm",
        "blk.{n}.ssm_c_norm": _MAMBA + "c_layernorm",
        "blk.{n}.ffn_gate_inp": _FEED + "router",
        "blk.{n}.ffn_gate": _FEED + "gate_proj",
        "blk.{n}.ffn_up": _FEED + "up_proj",
        "blk.{n}.ffn_down": _FEED + "down_proj",
    },
)
