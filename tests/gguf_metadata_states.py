"""The metadata of GGUF files of models with states a sequence."""

from __future__ import annotations

from gguf_metadata_common import Config, common, rotated


def _delta(config: Config) -> Config:
    rope = config.get("rope_parameters") or config
    values = config["linear_num_value_heads"]
    return common({"intermediate_size": 0} | config) | {
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        "full_attention_interval": config["full_attention_interval"],
        "rope.dimension_count": rotated(config, rope["partial_rotary_factor"]),
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": values,
        "ssm.inner_size": config["linear_value_head_dim"] * values,
    }


def _qwen3_5(config: Config) -> Config:
    """With a layer that looks ahead."""
    extra = config["mtp_num_hidden_layers"]
    return _delta(config) | {
        "block_count": config["num_hidden_layers"] + extra,
        "nextn_predict_layers": extra,
        "rope.dimension_sections": [3, 3, 2, 0],
    }


def _nemotron_h(config: Config) -> Config:
    layers, extra = config["hybrid_override_pattern"], config["num_nextn_predict_layers"]
    own = config | {"rms_norm_eps": config["norm_eps"], "head_dim": config["head_dim"]}
    heads, width = config["num_key_value_heads"], config["moe_intermediate_size"]
    return common(own) | {
        "block_count": len(layers) + extra,
        "nextn_predict_layers": extra,
        "attention.head_count_kv": [heads if each == "*" else 0 for each in f"{layers}*"],
        "feed_forward_length": [width if each == "E" else 0 for each in f"{layers}E"],
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": width,
        "expert_group_count": config["n_group"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "moe_latent_size": config["moe_latent_size"],
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.time_step_rank": config["mamba_num_heads"],
        "ssm.inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
    }


def _granite_hybrid(config: Config) -> Config:
    heads = config["num_key_value_heads"]
    return common(config) | {
        "context_length": 1 << 20,
        "attention.head_count_kv": [
            heads if each == "attention" else 0 for each in config["layer_types"]
        ],
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
        "expert_count": config["num_local_experts"],
        "expert_shared_feed_forward_length": config["shared_intermediate_size"],
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "rope.scaling.finetuned": False,
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.time_step_rank": config["mamba_n_heads"],
        "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
    }


def _lfm2_moe(config: Config) -> Config:
    heads, kinds = config["num_key_value_heads"], config["layer_types"]
    return common(config | {"rms_norm_eps": config["norm_eps"]}) | {
        "attention.head_count_kv": [heads if each != "conv" else 0 for each in kinds],
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": 2,
        "leading_dense_block_count": config["num_dense_layers"],
        "shortconv.l_cache": config["conv_L_cache"],
    }


def _jamba(config: Config) -> Config:
    heads = config["num_key_value_heads"]
    first, period = config["attn_layer_offset"], config["attn_layer_period"]
    layers = range(config["num_hidden_layers"])
    return common(config) | {
        "attention.head_count_kv": [heads if n % period == first else 0 for n in layers],
        "expert_count": config["num_experts"],
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.time_step_rank": config["mamba_dt_rank"],
    }


def _kimi_linear(config: Config) -> Config:
    linear, turned = config["linear_attn_config"], config["qk_rope_head_dim"]
    layers = range(1, config["num_hidden_layers"] + 1)
    own = {
        "max_position_embeddings": config["model_max_length"],
        "num_experts_per_tok": config["num_experts_per_token"],
    }
    return common(config | own) | {
        "attention.head_count_kv": [int(n in linear["full_attn_layers"]) for n in layers],
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "attention.key_length": config["kv_lora_rank"] + turned,
        "attention.key_length_mla": config["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["num_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "kda.head_dim": linear["head_dim"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "rope.dimension_count": turned,
        "ssm.conv_kernel": linear["short_conv_kernel_size"],
    }


STATES = {"granitemoehybrid": _granite_hybrid, "jamba": _jamba, "kimi_linear": _kimi_linear,
          "lfm2_moe": _lfm2_moe, "nemotron_h": _nemotron_h, "qwen3_5_moe": _qwen3_5,
          "qwen3_next": _delta}  # fmt: skip
