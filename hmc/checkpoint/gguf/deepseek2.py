"""DeepSeek V2, V3 and V3.2, Kimi K2, GLM-4.7-Flash and GLM-5, and Mistral 4 as GGUF files name
them: latent attention under a few architectures, some with indexers.
"""

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

_GROWTH = 0.1
"""How fast queries of Mistral 4 grow as published, which its files leave out."""


def _config(facts: Facts) -> Values:
    if facts.has("attention.temperature_scale"):
        return _mistral4(facts)
    values = _latent(facts, "")
    version = 3 if values["scoring_func"] == "sigmoid" else 2
    values["model_type"] = f"deepseek_v{version}"
    values["architectures"] = [f"DeepseekV{version}ForCausalLM"]
    if version == 2:
        grouped = values["n_group"] > 1
        values["topk_method"] = "group_limited_greedy" if grouped else "greedy"
    return values


def _mistral4(facts: Facts) -> Values:
    values = _latent(facts, "mistral4")
    values["norm_topk_prob"] = facts.flag("expert_weights_norm", True)
    if scaling := values.pop("rope_scaling", None):
        original, length = "rope.scaling.original_context_length", "attention.temperature_length"
        if facts.whole(length, facts.whole(original)) != facts.whole(original):
            raise facts.settings.unsupported(f"{facts.architecture}.{length}", original)
        scaling["llama_4_scaling_beta"] = facts.number("attention.temperature_scale", _GROWTH)
        values["rope_parameters"] = {**scaling, "rope_theta": values["rope_theta"]}
    return values


def _deepseek32(facts: Facts) -> Values:
    return _indexed(facts, "deepseek_v32")


def _glm_dsa(facts: Facts) -> Values:
    """Layers without an indexer share the choice of an earlier one."""
    values = _indexed(facts, "glm_moe_dsa")
    layers = range(int(values["num_hidden_layers"]))
    full = [f"blk.{layer}.indexer.proj.weight" in facts.tensors for layer in layers]
    return {**values, "indexer_types": ["full" if each else "shared" for each in full]}


def _indexed(facts: Facts, model_type: str) -> Values:
    return {
        **_latent(facts, model_type),
        "index_topk": facts.whole("attention.indexer.top_k"),
        "index_n_heads": facts.whole("attention.indexer.head_count"),
        "index_head_dim": facts.whole("attention.indexer.key_length"),
    }


def _latent(facts: Facts, model_type: str) -> Values:
    """What all say alike. Where a file does not say how scores are made, a bias for the choice of
    experts tells: it is the sigmoid's.
    """
    biased = any(name.endswith("exp_probs_b.bias") for name in facts.tensors)
    rotated = facts.whole("rope.dimension_count")
    values = {
        "model_type": model_type,
        **common_config(facts),
        **grouped_config(facts, gating(facts, default=2 if biased else 1)),
        "num_key_value_heads": facts.whole("attention.head_count"),
        "kv_lora_rank": facts.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": head_of(facts, "key") - rotated,
        "v_head_dim": head_of(facts, "value"),
        "rope_interleave": True,
        "topk_method": "noaux_tc",
    }
    if facts.has("attention.q_lora_rank"):
        values["q_lora_rank"] = facts.whole("attention.q_lora_rank")
    if "rope_scaling" in values and facts.has("rope.scaling.yarn_log_multiplier"):
        # The file has a tenth of what DeepSeek calls mscale_all_dim; mscale is the same for all.
        mscale = facts.number("rope.scaling.yarn_log_multiplier") * 10
        values["rope_scaling"] |= {"mscale": mscale, "mscale_all_dim": mscale}
    return values


def head_of(facts: Facts, what: str) -> int:
    """Elements a head of keys or values; files of 2025 on have those of the latent beside them."""
    own = f"attention.{what}_length_mla"
    return facts.whole(own if facts.has(own) else f"attention.{what}_length")


LATENT_NAMES = {
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
}
_INDEXER = {
    "blk.{n}.indexer.k_norm": LAYER + "self_attn.indexer.k_norm",
    "blk.{n}.indexer.proj": LAYER + "self_attn.indexer.weights_proj",
    "blk.{n}.indexer.attn_k": LAYER + "self_attn.indexer.wk",
    "blk.{n}.indexer.attn_q_b": LAYER + "self_attn.indexer.wq_b",
}

DEEPSEEK2 = GgufFamily(_config, LATENT_NAMES)
DEEPSEEK32 = GgufFamily(_deepseek32, {**LATENT_NAMES, **_INDEXER})
GLM_DSA = GgufFamily(_glm_dsa, {**LATENT_NAMES, **_INDEXER})
MISTRAL4 = GgufFamily(_mistral4, LATENT_NAMES)
