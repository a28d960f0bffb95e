"""The metadata of GGUF files as llama.cpp's converters write them, of configurations as models are
published with them.
"""

from __future__ import annotations

from typing import Any

from gguf_metadata_common import common, grouped, one, rotated
from gguf_metadata_latent import LATENT
from gguf_metadata_layers import LAYERS
from gguf_metadata_states import STATES

ARCHITECTURES = {
    "afmoe": "afmoe",
    "cohere2_moe": "cohere2moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "deepseek_v32": "deepseek32",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone_moe": "exaone-moe",
    "gemma4": "gemma4",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "hy_v3": "hy_v3",
    "jamba": "jamba",
    "kimi_linear": "kimi-linear",
    "laguna": "laguna",
    "lfm2_moe": "lfm2moe",
    "llama4": "llama4",
    "mellum": "mellum",
    "mimo_v2_flash": "mimo2",
    "minimax_m2": "minimax-m2",
    "mistral4": "mistral4",
    "mixtral": "llama",
    "nemotron_h": "nemotron_h_moe",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_vl_moe": "qwen3vlmoe",
    "sarvam_moe": "bailingmoe2",
    "solar_open": "glm4moe",
    "step3p5": "step35",
}
"""Of families by `model_type`."""


def _qwen3_moe(config: dict[str, Any]) -> dict[str, Any]:
    return common(config) | {
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "expert_count": config.get("num_experts") or config["num_local_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }


def _mixtral(config: dict[str, Any]) -> dict[str, Any]:
    return common(config) | {
        "expert_count": config["num_local_experts"],
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
    }


def _gpt_oss(config: dict[str, Any]) -> dict[str, Any]:
    return common(config) | {
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.sliding_window": config["sliding_window"],
        "expert_count": config["num_local_experts"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def _qwen2_moe(config: dict[str, Any]) -> dict[str, Any]:
    return common(config) | {
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }


def _glm4_moe(config: dict[str, Any]) -> dict[str, Any]:
    ahead = config.get("num_nextn_predict_layers", 0)
    return grouped(config) | {
        "block_count": config["num_hidden_layers"] + ahead,
        "nextn_predict_layers": ahead,
        "rope.dimension_count": rotated(config, config.get("partial_rotary_factor", 0.5)),
    }


def _olmoe(config: dict[str, Any]) -> dict[str, Any]:
    return common(config) | {"expert_count": config["num_experts"]}


def _minimax_m2(config: dict[str, Any]) -> dict[str, Any]:
    return common(config) | {
        "expert_count": config["num_local_experts"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_gating_func": 2,
        "rope.dimension_count": config["rotary_dim"],
    }


def _ernie(config: dict[str, Any]) -> dict[str, Any]:
    shared = config["intermediate_size"] // config["num_key_value_heads"]
    return common(config) | {
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
    return common(config) | {
        "rope.freq_base": base,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "expert_count": config["num_experts"],
        "expert_shared_count": one(config, "num_shared_expert"),
        "expert_feed_forward_length": one(config, "moe_intermediate_size"),
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
    return common(config) | {
        "rope.dimension_count": rotated(config, 1.0),
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
    return grouped(
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
    return common(config | {"rms_norm_eps": config["layernorm_epsilon"]}) | {
        "attention.head_count_kv": [kinds[each] for each in pattern],
        "attention.value_length": config["v_head_dim"],
        "attention.value_scale": config["attention_value_scale"],
        "attention.sliding_window": config["sliding_window_size"],
        "attention.sliding_window_pattern": [bool(each) for each in pattern],
        "rope.dimension_count": rotated(config, config["partial_rotary_factor"]),
        "rope.freq_base_swa": float(config["swa_rope_theta"]),
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": 2,
    }


def _hy_v3(config: dict[str, Any]) -> dict[str, Any]:
    ahead, width = config["num_nextn_predict_layers"], config["moe_intermediate_size"]
    return common(config) | {
        "block_count": config["num_hidden_layers"] + ahead,
        "nextn_predict_layers": ahead,
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": width,
        "expert_shared_feed_forward_length": width * config["num_shared_experts"],
        "expert_weights_norm": True,
        "expert_weights_scale": config["router_scaling_factor"],
        "expert_gating_func": 2,
    }


def _sarvam_moe(config: dict[str, Any]) -> dict[str, Any]:
    own = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
    width = config["moe_intermediate_size"] * config["num_shared_experts"]
    return grouped(config | {name: config[key] for name, key in own.items()}) | {
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_shared_feed_forward_length": width,
        "rope.dimension_count": config["head_dim"],
    }


METADATA = {**LATENT, **LAYERS, **STATES, "qwen3_moe": _qwen3_moe, "mixtral": _mixtral,
            "gpt_oss": _gpt_oss, "qwen3_vl_moe": _qwen3_moe, "qwen2_moe": _qwen2_moe,
            "glm4_moe": _glm4_moe, "solar_open": _glm4_moe, "dots1": grouped,
            "olmoe": _olmoe, "minimax_m2": _minimax_m2, "ernie4_5_moe": _ernie,
            "hunyuan_v1_moe": _hunyuan, "granitemoe": _granite, "granitemoeshared": _granite,
            "phimoe": _phimoe, "afmoe": _afmoe, "exaone_moe": _exaone,
            "mimo_v2_flash": _mimo, "hy_v3": _hy_v3, "sarvam_moe": _sarvam_moe}  # fmt: skip
