"""The metadata of GGUF files as llama.cpp's converters write them, of configurations as models are
published with them.
"""

from __future__ import annotations

from typing import Any

ARCHITECTURES = {
    "afmoe": "afmoe",
    "deepseek_v3": "deepseek2",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone_moe": "exaone-moe",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "mimo_v2_flash": "mimo2",
    "minimax_m2": "minimax-m2",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_vl_moe": "qwen3vlmoe",
    "solar_open": "glm4moe",
}
"""Of families by `model_type`."""


def _common(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        "expert_used_count": _one(config, "num_experts_per_tok", "moe_k", "moe_topk"),
        "vocab_size": config["vocab_size"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }
    if rope.get("rope_type", rope.get("type")) == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    if "head_dim" in config:
        found["attention.key_length"] = found["attention.value_length"] = config["head_dim"]
    if "mscale_all_dim" in rope and "alpha" not in rope:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return found


def _one(config: dict[str, Any], *keys: str) -> int:
    """What the first of the keys that there is says, of all layers alike."""
    found = next(config[key] for key in keys if key in config)
    return found[0] if isinstance(found, list) else found


def _rotated(config: dict[str, Any], share: float) -> int:
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(size * share)


def _qwen3_moe(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "expert_count": config.get("num_experts") or config["num_local_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }


def _mixtral(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "expert_count": config["num_local_experts"],
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
    }


def _deepseek_v3(config: dict[str, Any]) -> dict[str, Any]:
    rotated, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    found = _common(config) | {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "attention.key_length": config["kv_lora_rank"] + rotated,
        "attention.value_length": config["kv_lora_rank"],
        "attention.key_length_mla": nope + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rotated,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": 2,
    }
    if config["q_lora_rank"]:
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    return found


def _gpt_oss(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.sliding_window": config["sliding_window"],
        "expert_count": config["num_local_experts"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def _qwen2_moe(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }


def _grouped(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "leading_dense_block_count": config.get("first_k_dense_replace", 0),
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": 2,
    }


def _glm4_moe(config: dict[str, Any]) -> dict[str, Any]:
    ahead = config.get("num_nextn_predict_layers", 0)
    return _grouped(config) | {
        "block_count": config["num_hidden_layers"] + ahead,
        "nextn_predict_layers": ahead,
        "rope.dimension_count": _rotated(config, config.get("partial_rotary_factor", 0.5)),
    }


def _olmoe(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {"expert_count": config["num_experts"]}


def _minimax_m2(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "expert_count": config["num_local_experts"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_gating_func": 2,
        "rope.dimension_count": config["rotary_dim"],
    }


def _ernie(config: dict[str, Any]) -> dict[str, Any]:
    shared = config["intermediate_size"] // config["num_key_value_heads"]
    return _common(config) | {
        "expert_count": config["moe_num_experts"],
        "expert_shared_count": config["moe_num_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": shared,  # as the converter writes it: no true size
        "interleave_moe_layer_step": config["moe_layer_interval"],
        "leading_dense_block_count": config["moe_layer_start_index"],
    }


def _hunyuan(config: dict[str, Any]) -> dict[str, Any]:
    size = config["hidden_size"] // config["num_attention_heads"]
    base = config["rope_theta"]
    if alpha := (config.get("rope_scaling") or {}).get("alpha"):
        size = config["head_dim"]
        base *= alpha ** (size / (size - 2))
    return _common(config) | {
        "rope.freq_base": base,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "expert_count": config["num_experts"],
        "expert_shared_count": _one(config, "num_shared_expert"),
        "expert_feed_forward_length": _one(config, "moe_intermediate_size"),
        "expert_shared_feed_forward_length": config["intermediate_size"],
    }


def _granite(config: dict[str, Any]) -> dict[str, Any]:
    found = _mixtral(config) | {
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
    }
    if shared := config.get("shared_intermediate_size"):
        found["expert_shared_feed_forward_length"] = shared
    return found


def _phimoe(config: dict[str, Any]) -> dict[str, Any]:
    return _mixtral(config) | {
        "attention.sliding_window": config["sliding_window"],
        "rope.scaling.original_context_length": config["original_max_position_embeddings"],
        "rope.scaling.attn_factor": 1.190238,  # the converter's own, not the published one
    }


def _afmoe(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "rope.dimension_count": _rotated(config, 1.0),
        "expert_count": config["num_experts"],
        "expert_shared_count": config["num_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "leading_dense_block_count": config["num_dense_layers"],
        "expert_weights_norm": config["route_norm"],
        "expert_weights_scale": config["route_scale"],
        "expert_gating_func": 2,
        "attention.sliding_window": config["sliding_window"],
    }


def _exaone(config: dict[str, Any]) -> dict[str, Any]:
    ahead = config["num_nextn_predict_layers"]
    slides = [each == "sliding_attention" for each in config["layer_types"]]
    return _grouped(
        config
        | {
            "n_routed_experts": config["num_experts"],
            "n_shared_experts": config["num_shared_experts"],
        }
    ) | {
        "block_count": config["num_hidden_layers"] + ahead,
        "nextn_predict_layers": ahead,
        "rope.scaling.type": "none",
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": slides,
    }


def _mimo(config: dict[str, Any]) -> dict[str, Any]:
    pattern = config["hybrid_layer_pattern"]
    kinds = config["num_key_value_heads"], config["swa_num_key_value_heads"]
    return _common(config | {"rms_norm_eps": config["layernorm_epsilon"]}) | {
        "attention.head_count_kv": [kinds[each] for each in pattern],
        "attention.value_length": config["v_head_dim"],
        "attention.value_scale": config["attention_value_scale"],
        "attention.sliding_window": config["sliding_window_size"],
        "attention.sliding_window_pattern": [bool(each) for each in pattern],
        "rope.dimension_count": _rotated(config, config["partial_rotary_factor"]),
        "rope.freq_base_swa": float(config["swa_rope_theta"]),
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": 2,
    }


METADATA = {"qwen3_moe": _qwen3_moe, "mixtral": _mixtral, "deepseek_v3": _deepseek_v3,
            "gpt_oss": _gpt_oss, "qwen3_vl_moe": _qwen3_moe, "qwen2_moe": _qwen2_moe,
            "glm4_moe": _glm4_moe, "solar_open": _glm4_moe, "dots1": _grouped,
            "olmoe": _olmoe, "minimax_m2": _minimax_m2, "ernie4_5_moe": _ernie,
            "hunyuan_v1_moe": _hunyuan, "granitemoe": _granite, "granitemoeshared": _granite,
            "phimoe": _phimoe, "afmoe": _afmoe, "exaone_moe": _exaone,
            "mimo_v2_flash": _mimo}  # fmt: skip
