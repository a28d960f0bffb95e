"""DeepSeek V2 and V3 and Kimi K2 as GGUF files name them, all of one architecture."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    GROUPED,
    LAYER,
    Facts,
    GgufFamily,
    Piece,
    Values,
    common_config,
    gating,
    grouped_config,
)


def _config(facts: Facts) -> Values:
    scoring = gating(facts, default=1)
    rotated = facts.whole("rope.dimension_count")
    values = {
        "model_type": "deepseek_v3" if scoring == "sigmoid" else "deepseek_v2",
        **common_config(facts),
        **grouped_config(facts, scoring),
        "num_key_value_heads": facts.whole("attention.head_count"),
        "kv_lora_rank": facts.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": _head(facts, "key") - rotated,
        "v_head_dim": _head(facts, "value"),
        "rope_interleave": True,
    }
    values["architectures"] = [f"DeepseekV{values['model_type'][-1]}ForCausalLM"]
    if facts.has("attention.q_lora_rank"):
        values["q_lora_rank"] = facts.whole("attention.q_lora_rank")
    if values["model_type"] == "deepseek_v3":
        values["topk_method"] = "noaux_tc"
    else:
        grouped = values["n_group"] > 1
        values["topk_method"] = "group_limited_greedy" if grouped else "greedy"
    if "rope_scaling" in values and facts.has("rope.scaling.yarn_log_multiplier"):
        # The file has a tenth of what DeepSeek calls mscale_all_dim; mscale is the same for all.
        mscale = facts.number("rope.scaling.yarn_log_multiplier") * 10
        values["rope_scaling"] |= {"mscale": mscale, "mscale_all_dim": mscale}
    return values


def _head(facts: Facts, what: str) -> int:
    """Elements a head of keys or values; files of 2025 on have those of the latent beside them."""
    own = f"attention.{what}_length_mla"
    return facts.whole(own if facts.has(own) else f"attention.{what}_length")


DEEPSEEK2 = GgufFamily(
    _config,
    {
        **COMMON,
        "blk.{n}.attn_q_a": LAYER + "self_attn.q_a_proj",
        "blk.{n}.attn_q_a_norm": LAYER + "self_attn.q_a_layernorm",
        "blk.{n}.attn_q_b": LAYER + "self_attn.q_b_proj",
        "blk.{n}.attn_kv_a_mqa": LAYER + "self_attn.kv_a_proj_with_mqa",
        "blk.{n}.attn_kv_a_norm": LAYER + "self_attn.kv_a_layernorm",
        "blk.{n}.attn_kv_b": LAYER + "self_attn.kv_b_proj",
        # Files of 2025 on: each head's keys, by the latent's columns, and its values.
        "blk.{n}.attn_k_b.weight": Piece(LAYER + "self_attn.kv_b_proj.weight", transposed=True),
        "blk.{n}.attn_v_b.weight": Piece(LAYER + "self_attn.kv_b_proj.weight"),
        **GROUPED,
    },
)
