"""What llama.cpp's converters write of configurations of every family."""

from __future__ import annotations

from typing import Any

CHOSEN = "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k"
BOUNDS = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
Config = dict[str, Any]


def common(config: Config) -> Config:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    slower = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    found: Config = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        "expert_used_count": one(config, *CHOSEN),
        "vocab_size": config["vocab_size"],
        "tokenizer.ggml.eos_token_id": one(config, "eos_token_id"),
    }
    if rope.get("rope_type", rope.get("type")) == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
        found |= {
            f"rope.scaling.yarn_{theirs}": float(rope[name])
            for name, theirs in BOUNDS.items()
            if name in rope
        }
    if slower:
        found["rope.freq_base_swa"] = float(slower["rope_theta"])
    if "head_dim" in config:
        found["attention.key_length"] = found["attention.value_length"] = config["head_dim"]
    if "mscale_all_dim" in rope and "alpha" not in rope:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return found


def one(config: Config, *keys: str) -> int:
    """What the first of the keys that there is says, of all layers alike."""
    found = next(config[key] for key in keys if key in config)
    return found[0] if isinstance(found, list) else found


def slides(config: Config) -> list[bool]:
    return [each == "sliding_attention" for each in config["layer_types"]]


def rotated(config: Config, share: float) -> int:
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(size * share)


def grouped(config: Config) -> Config:
    return common(config) | {
        "leading_dense_block_count": config.get("first_k_dense_replace", 0),
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": 2,
    }
