"""gpt-oss as GGUF files name it."""

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
    head_dim,
)


def _config(facts: Facts) -> Values:
    values = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_local_experts"),
        "intermediate_size": facts.whole("expert_feed_forward_length"),
        "sliding_window": facts.whole("attention.sliding_window"),
        **APART,
    }
    if "rope_scaling" in values:  # of which files do not say that its bounds are no whole numbers
        values["rope_scaling"] |= {"truncate": False}
    return values


GPT_OSS = GgufFamily(
    _config,
    {
        **COMMON,
        **experts(),
        "blk.{n}.attn_sinks.weight": LAYER + "self_attn.sinks",
        "blk.{n}.post_attention_norm": LAYER + "post_attention_layernorm",
        "blk.{n}.ffn_gate_inp": LAYER + "mlp.router",
    },
)
