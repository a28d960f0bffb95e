"""The metadata of GGUF files of models with latent attention."""

from __future__ import annotations

from gguf_metadata_common import Config, common


def _latent(config: Config) -> Config:
    turned, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    found = common(config) | {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "attention.key_length": config["kv_lora_rank"] + turned,
        "attention.value_length": config["kv_lora_rank"],
        "attention.key_length_mla": nope + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": turned,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_weights_scale": config["routed_scaling_factor"],
    }
    if config["norm_topk_prob"]:
        found["expert_weights_norm"] = True
    if scoring := config.get("scoring_func"):
        found["expert_gating_func"] = {"softmax": 1, "sigmoid": 2}[scoring]
    if config["q_lora_rank"]:
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    return found


def _ahead(config: Config) -> Config:
    """With the layers that look ahead."""
    extra = config["num_nextn_predict_layers"]
    return _latent(config) | {
        "block_count": config["num_hidden_layers"] + extra,
        "nextn_predict_layers": extra,
    }


def _indexed(config: Config) -> Config:
    return _ahead(config) | {
        "attention.indexer.head_count": config["index_n_heads"],
        "attention.indexer.key_length": config["index_head_dim"],
        "attention.indexer.top_k": config["index_topk"],
    }


LATENT = {"deepseek_v2": _latent, "deepseek_v3": _latent, "deepseek_v32": _indexed,
          "glm4_moe_lite": _ahead, "glm_moe_dsa": _indexed, "mistral4": _latent}  # fmt: skip
