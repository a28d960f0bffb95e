"""The metadata of GGUF files of models whose layers differ in windows, heads or rope."""

from __future__ import annotations

from gguf_metadata_common import Config, common, rotated, slides


def _llama4(config: Config) -> Config:
    own = config | {"intermediate_size": config["intermediate_size_mlp"]}
    return common(own) | {
        "rope.dimension_count": config["head_dim"],
        "interleave_moe_layer_step": config["interleave_moe_layer_step"],
        "expert_count": config["num_local_experts"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def _gemma4(config: Config) -> Config:
    windows, size, whole = slides(config), config["head_dim"], config["global_head_dim"]
    kinds = config["num_global_key_value_heads"], config["num_key_value_heads"]
    return common(config) | {
        "attention.head_count_kv": [kinds[each] for each in windows],
        "attention.key_length": whole,
        "attention.value_length": whole,
        "attention.key_length_swa": size,
        "attention.value_length_swa": size,
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": windows,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "final_logit_softcapping": config["final_logit_softcapping"],
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": size,
    }


def _cohere2_moe(config: Config) -> Config:
    shared = config["num_shared_experts"]
    dense = {"intermediate_size": config["prefix_dense_intermediate_size"], "rms_norm_eps": None}
    return common(config | dense) | {
        "attention.layer_norm_epsilon": config["layer_norm_eps"],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": slides(config),
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_gating_func": 2,
        "expert_shared_count": shared,
        "expert_shared_feed_forward_length": config["intermediate_size"] * shared,
        "expert_weights_norm": config["norm_topk_prob"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "logit_scale": config["logit_scale"],
        "rope.dimension_count": config["head_dim"],
        "rope.scaling.type": "none",
    }


def _step35(config: Config) -> Config:
    windows, other = slides(config), config["attention_other_setting"]
    full, slower = config["rope_theta"][:2]
    own = config | {"rope_theta": full, "num_key_value_heads": 0}
    extra = config["num_nextn_predict_layers"]

    def by_layer(key: str) -> list[int]:
        return [(config, other)[each][key] for each in windows]

    return common(own) | {
        "block_count": config["num_hidden_layers"] + extra,
        "nextn_predict_layers": extra,
        "attention.head_count": by_layer("num_attention_heads"),
        "attention.head_count_kv": by_layer("num_attention_groups"),
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": windows,
        "expert_count": config["moe_num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": 2,
        "expert_shared_feed_forward_length": config["share_expert_dim"],
        "expert_weights_norm": config["norm_expert_weight"],
        "expert_weights_scale": config["moe_router_scaling_factor"],
        "leading_dense_block_count": 1,
        "rope.freq_base_swa": slower,
        "swiglu_clamp_exp": config["swiglu_limits"],
        "swiglu_clamp_shexp": config["swiglu_limits_shared"],
    }


def _laguna(config: Config) -> Config:
    full, sliding = (
        config["rope_parameters"][f"{kind}_attention"]["partial_rotary_factor"]
        for kind in ("full", "sliding")
    )
    return common(config) | {
        "attention.head_count": config["num_attention_heads_per_layer"],
        "attention.sliding_window": config["sliding_window"],
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": 2,
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        "expert_weights_norm": True,
        "expert_weights_scale": config["moe_routed_scaling_factor"],
        "leading_dense_block_count": config["mlp_layer_types"].count("dense"),
        "rope.dimension_count": rotated(config, full),
        "rope.dimension_count_swa": rotated(config, sliding),
    }


def _mellum(config: Config) -> Config:
    return common(config) | {
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": slides(config),
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }


LAYERS = {"cohere2_moe": _cohere2_moe, "gemma4": _gemma4, "laguna": _laguna, "llama4": _llama4,
          "mellum": _mellum, "step3p5": _step35}  # fmt: skip
