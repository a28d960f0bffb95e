"""Gemma 4 with experts as GGUF files name it. Of full layers, factors of frequencies say which
pairs of a head are turned.
"""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    LAYER,
    QK_NORMS,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    layer_types,
    renamed,
    share_of,
)
from hmc.checkpoint.gguf.rope import FACTORS, by_layer_type
from hmc.errors import UnsupportedError

_STANDS = 1e20
"""A factor from which on a pair is not turned: converters write 1e30."""


def _config(facts: Facts) -> Values:
    if not facts.whole("expert_count", 0):
        raise UnsupportedError(
            f"{facts.settings.path}: a gemma4 without experts; hmc reads those that have some"
        )
    slides = facts.slides()
    kinds = dict(zip(slides, facts.by_layer("attention.head_count_kv"), strict=True))
    size = facts.whole("attention.key_length_swa")
    values = {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        **common_config(facts, kinds.get(1, 1)),
        **experts_config(facts, "num_experts"),
        **by_layer_type(facts, size),
        "hidden_activation": "gelu_pytorch_tanh",
        "top_k_experts": facts.whole("expert_used_count"),
        "enable_moe_block": True,
        "intermediate_size": facts.whole("feed_forward_length"),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "head_dim": size,
        "global_head_dim": facts.whole("attention.key_length"),
        "num_global_key_value_heads": kinds.get(0, 1),
        "attention_k_eq_v": bool(facts.layers_without("attn_v.weight")),
        "sliding_window": facts.whole("attention.sliding_window"),
        "layer_types": layer_types(slides),
        "final_logit_softcapping": facts.number("final_logit_softcapping", 0.0),
        "hidden_size_per_layer_input": facts.whole("embedding_length_per_layer_input", 0),
        "num_kv_shared_layers": facts.whole("attention.shared_kv_layers", 0),
    }
    values["rope_parameters"]["full_attention"] |= _proportional(facts)
    return values


def _proportional(facts: Facts) -> Values:
    """Pairs lie half a head apart, and the first of them are turned, as fast as in a whole head."""
    factors = facts.floats(FACTORS)
    turned = [factor for factor in factors if factor < _STANDS]
    first = turned[0] if turned else 1.0
    expected = turned[:1] * len(turned) + factors[-1:] * (len(factors) - len(turned))
    fits = len(factors) * 2 == facts.whole("attention.key_length") and first > 0
    if not fits or factors != expected:
        raise UnsupportedError(
            f"{facts.settings.path}: tensor {FACTORS!r} is not one factor for the first pairs of a"
            " head and another for those that stand"
        )
    share = share_of(2 * len(turned), 2 * len(factors))
    return {"rope_type": "proportional", "partial_rotary_factor": share, "factor": first}


_NAMES = {
    **COMMON,
    **QK_NORMS,
    **experts(""),
    "blk.{n}.ffn_gate_inp": LAYER + "router.proj",
    "blk.{n}.ffn_gate_inp.scale": LAYER + "router.scale",
    "blk.{n}.ffn_down_exps.scale": LAYER + "router.per_expert_scale",
    "blk.{n}.post_attention_norm": LAYER + "post_attention_layernorm",
    "blk.{n}.ffn_norm": LAYER + "pre_feedforward_layernorm",
    "blk.{n}.pre_ffw_norm_2": LAYER + "pre_feedforward_layernorm_2",
    "blk.{n}.post_ffw_norm": LAYER + "post_feedforward_layernorm",
    "blk.{n}.post_ffw_norm_1": LAYER + "post_feedforward_layernorm_1",
    "blk.{n}.post_ffw_norm_2": LAYER + "post_feedforward_layernorm_2",
    "blk.{n}.layer_output_scale.weight": LAYER + "layer_scalar",
}

GEMMA4 = GgufFamily(
    _config, renamed(_NAMES, "model.", "model.language_model."), settings=(FACTORS,)
)
