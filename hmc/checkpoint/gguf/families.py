"""What a family is to GGUF files: the names of its tensors, and its configuration as metadata.

A row translates both to what Hugging Face calls them, so that hmc/models builds from a GGUF file
what it builds from a directory. Names and keys are those of llama.cpp's converters (gguf-py,
constants.py and tensor_mapping.py; conversion/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.jsonfile import quote
from hmc.errors import ConfigError

Values = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """The metadata of one architecture, and the shapes of the tensors that there are, by name."""

    settings: ModelConfig
    architecture: str
    tensors: Mapping[str, tuple[int, ...]]
    floats: Callable[[str], list[float]]
    """The numbers of a vector of 32-bit floats, by the tensor's name."""

    def has(self, key: str) -> bool:
        """Whether there is a key."""
        return self._full(key) in self.settings

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default it must be there."""
        full = self._full(key)
        if default is None:
            return self.settings.require_int(full)
        return self.settings.get_int(full, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; without a default it must be there."""
        full = self._full(key)
        if default is None:
            return self.settings.require_float(full)
        return self.settings.get_float(full, default)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self.settings.get_bool(self._full(key), default)

    def by_layer(self, key: str) -> list[int]:
        """A whole number, or true and false as such, for each layer; one is that of all."""
        found = self.settings.values.get(self._full(key))
        if type(found) is int:
            return [found] * self.layers
        return [int(each) for each in self._array(key)]

    def numbers(self, key: str) -> list[float]:
        """A finite number for each layer, 0 where the key is not there."""
        found = [float(each) for each in self._array(key)] if self.has(key) else [0.0] * self.layers
        if not all(map(math.isfinite, found)):
            raise self.settings.error(self._full(key), "must be finite numbers")
        return found

    def slides(self, default: list[int] | None = None) -> list[int]:
        """Whether each layer sees a window of tokens alone, as 0 or 1."""
        key = "attention.sliding_window_pattern"
        return self.by_layer(key) if default is None or self.has(key) else default

    def text(self, key: str, default: str) -> str:
        """A string."""
        return self.settings.get_str(self._full(key), default)

    @property
    def layers(self) -> int:
        """Layers without those that predict further tokens."""
        extra = self.whole("nextn_predict_layers", 0)
        count = self.whole("block_count")
        if not extra < count:
            raise self.settings.error(self._full("block_count"), f"is {count}: no layers")
        if count > len(self.tensors):
            raise ConfigError(
                f"{self.settings.path}: {count} layers, but {len(self.tensors)} tensors"
            )
        return count - extra

    def layers_without(self, tensor: str) -> list[int]:
        """Layers that have no tensor "blk.<n>.<tensor>"."""
        return [n for n in range(self.layers) if f"blk.{n}.{tensor}" not in self.tensors]

    def _array(self, key: str) -> Any:
        found = self.settings.values.get(self._full(key))
        if not isinstance(found, memoryview) or len(found) < self.layers:
            raise self.settings.error(self._full(key), "must be one for each layer")
        return found[: self.layers]

    def _full(self, key: str) -> str:
        return f"{self.architecture}.{key}"


@dataclass(frozen=True)
class Piece:
    """Some rows of each head of the tensor `target`; `transposed`, each head's lie by columns."""

    target: str
    transposed: bool = False


@dataclass(frozen=True)
class Flat:
    """The vector `target`, whose elements lie in rows."""

    target: str


@dataclass(frozen=True)
class GgufFamily:
    """One architecture.

    `tensors` maps a name, or one without its ".weight" or ".bias", to the published one; `{n}` is
    the layer, `{e}` the expert. Of a target with an expert that the name lacks the tensor holds
    all, and of several targets it holds their rows, as many of each, one after the other. Pieces of
    a target are in the order of rows. `config` gives the values of config.json; tensors that hold
    such, and no weights, are `settings`.
    """

    config: Callable[[Facts], Values]
    tensors: Mapping[str, str | tuple[str, ...] | Piece | Flat]
    settings: tuple[str, ...] = ()


LAYER = "model.layers.{n}."

COMMON: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{n}.attn_norm": LAYER + "input_layernorm",
    "blk.{n}.ffn_norm": LAYER + "post_attention_layernorm",
    "blk.{n}.attn_q": LAYER + "self_attn.q_proj",
    "blk.{n}.attn_k": LAYER + "self_attn.k_proj",
    "blk.{n}.attn_v": LAYER + "self_attn.v_proj",
    "blk.{n}.attn_output": LAYER + "self_attn.o_proj",
    "blk.{n}.ffn_gate": LAYER + "mlp.gate_proj",
    "blk.{n}.ffn_up": LAYER + "mlp.up_proj",
    "blk.{n}.ffn_down": LAYER + "mlp.down_proj",
    "blk.{n}.nextn.eh_proj": LAYER + "eh_proj",
    "blk.{n}.nextn.embed_tokens": LAYER + "embed_tokens",
    "blk.{n}.nextn.enorm": LAYER + "enorm",
    "blk.{n}.nextn.hnorm": LAYER + "hnorm",
    "blk.{n}.nextn.shared_head_head": LAYER + "shared_head.head",
    "blk.{n}.nextn.shared_head_norm": LAYER + "shared_head.norm",
}
"""Tensors that most families have."""

QK_NORMS: Mapping[str, str] = {
    "blk.{n}.attn_q_norm": LAYER + "self_attn.q_norm",
    "blk.{n}.attn_k_norm": LAYER + "self_attn.k_norm",
}

Names = dict[str, str | tuple[str, ...]]


def shared_expert(prefix: str) -> Names:
    """The MLP below `prefix` of a layer that every token goes through."""
    return {
        f"blk.{{n}}.ffn_{role}_shexp": f"{LAYER}{prefix}.{role}_proj"
        for role in ("gate", "up", "down")
    }


def experts(
    prefix: str = "mlp.", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Names:
    """Router and routed experts below `prefix` of a layer: all of a projection in one tensor, of
    gate and up too, or (files of early 2024) each in its own.
    """
    each = LAYER + prefix + "experts.{e}."
    return {
        "blk.{n}.ffn_gate_inp": LAYER + prefix + "gate",
        "blk.{n}.ffn_gate_exps": each + gate,
        "blk.{n}.ffn_up_exps": each + up,
        "blk.{n}.ffn_down_exps": each + down,
        "blk.{n}.ffn_gate_up_exps": (each + gate, each + up),
        "blk.{n}.ffn_gate.{e}": each + gate,
        "blk.{n}.ffn_up.{e}": each + up,
        "blk.{n}.ffn_down.{e}": each + down,
    }


def renamed(names: Mapping[str, str | tuple[str, ...]], old: str, new: str) -> Names:
    """The same with `new` for the first `old` of each target."""
    return {
        key: target.replace(old, new, 1)
        if isinstance(target, str)
        else tuple(each.replace(old, new, 1) for each in target)
        for key, target in names.items()
    }


def common_config(facts: Facts, kv_heads: int = 0, heads: int = 0) -> Values:
    """What every family's config.json says; `heads`, and `kv_heads` of keys, where layers differ in
    them.
    """
    heads = heads or facts.whole("attention.head_count")
    return {
        "hidden_size": facts.whole("embedding_length"),
        "num_hidden_layers": facts.layers,
        "num_nextn_predict_layers": facts.whole("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or facts.whole("attention.head_count_kv", heads),
        "max_position_embeddings": facts.whole("context_length"),
        **_epsilon(facts),
        "rope_theta": facts.number("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in facts.tensors,
        "tie_word_embeddings": "output.weight" not in facts.tensors,
        **rope_scaling(facts),
    }


def _epsilon(facts: Facts) -> Values:
    """Of norms without means, or, where the file has none of those, of norms with."""
    root, mean = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
    if facts.has(mean) and not facts.has(root):
        return {"layer_norm_eps": facts.number(mean)}
    return {"rms_norm_eps": facts.number(root)}


def layer_types(slides: list[int]) -> list[str]:
    """What the layers are called that slide and that do not."""
    return [f"{'sliding' if each else 'full'}_attention" for each in slides]


def mlp_types(facts: Facts) -> list[str]:
    """What the layers are called that are routed and that are not."""
    dense = facts.layers_without("ffn_gate_inp.weight")
    return ["dense" if index in dense else "sparse" for index in range(facts.layers)]


def head_dim(facts: Facts) -> Values:
    """The size of a head, where all of it is rotated."""
    size = _head_size(facts)
    if facts.whole("rope.dimension_count", size) != size:
        raise facts.settings.unsupported(
            f"{facts.architecture}.rope.dimension_count", f"{size}, all of a head"
        )
    return {"head_dim": size}


def rotated_head_dim(facts: Facts) -> Values:
    """The size of a head, and how much of it is rotated."""
    size = _head_size(facts)
    return {"head_dim": size, "partial_rotary_factor": rotated_share(facts, size)}


def rotated_share(facts: Facts, size: int, key: str = "rope.dimension_count") -> float:
    """How much of a head of `size` elements is rotated."""
    return share_of(facts.whole(key, size), size)


def share_of(rotated: int, size: int) -> float:
    """A number that `size` times is `rotated`, rounded down."""
    share = rotated / (size or 1)
    return math.nextafter(share, math.inf) if int(size * share) < rotated else share


def _head_size(facts: Facts) -> int:
    heads = facts.whole("attention.head_count") or 1
    size = facts.whole("attention.key_length", facts.whole("embedding_length") // heads)
    if facts.whole("attention.value_length", size) != size:
        raise facts.settings.unsupported(
            f"{facts.architecture}.attention.value_length", f"{size}, as keys have"
        )
    return size


def experts_config(facts: Facts, count_key: str) -> Values:
    """Sizes of routed experts; the config calls their number `count_key`."""
    return {
        count_key: facts.whole("expert_count"),
        "num_experts_per_tok": facts.whole("expert_used_count"),
    }


def grouped_config(facts: Facts, scoring: str) -> Values:
    """What DeepSeek's and its followers' say of experts, whose scores are made by `scoring`."""
    return {
        **experts_config(facts, "n_routed_experts"),
        "scoring_func": scoring,
        "intermediate_size": facts.whole("feed_forward_length", 0),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "first_k_dense_replace": facts.whole("leading_dense_block_count", 0),
        "n_shared_experts": facts.whole("expert_shared_count", 0),
        "n_group": facts.whole("expert_group_count", 1),
        "topk_group": facts.whole("expert_group_used_count", 1),
        "norm_topk_prob": facts.flag("expert_weights_norm", False),
        "routed_scaling_factor": facts.number("expert_weights_scale", 1.0),
    }


APART: Values = {"quantization_config": {"quant_method": "gguf"}}
"""Says that gate and up, which published stacks hold in one, are apart (hmc/models/stacks.py)."""

GROUPED: Names = {
    **experts(),
    **shared_expert("mlp.shared_experts"),
    "blk.{n}.exp_probs_b.bias": LAYER + "mlp.gate.e_score_correction_bias",
}
"""Experts as DeepSeek's and its followers' are called."""


def rope_scaling(facts: Facts) -> Values:
    """`rope_scaling` of config.json, where frequencies are scaled."""
    kind = facts.text("rope.scaling.type", "none")
    own = {"none": (), "linear": (), "yarn": _YARN}.get(kind)
    if own is None:
        raise facts.settings.unsupported(
            f"{facts.architecture}.rope.scaling.type", "none, linear and yarn"
        )
    if kind == "none":
        return {}
    scaling: Values = {"rope_type": kind, "factor": facts.number("rope.scaling.factor")}
    scaling |= {name: facts.number(key) for key, name in own if facts.has(key)}
    if facts.has("rope.scaling.original_context_length"):
        original = facts.whole("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling}


_YARN = (
    ("rope.scaling.yarn_attn_factor", "attention_factor"),
    ("rope.scaling.yarn_beta_fast", "beta_fast"),
    ("rope.scaling.yarn_beta_slow", "beta_slow"),
)


def sigmoid_alone(facts: Facts) -> str:
    """How router logits become scores in families that know the sigmoid alone."""
    if (scoring := gating(facts, default=2)) != "sigmoid":
        raise facts.settings.unsupported(f"{facts.architecture}.expert_gating_func", "2 (sigmoid)")
    return scoring


def gating(facts: Facts, default: int) -> str:
    """How router logits become scores, as `scoring_func` says it."""
    names = {1: "softmax", 2: "sigmoid"}
    number = facts.whole("expert_gating_func", default)
    if number not in names:
        raise ConfigError(
            f"{facts.settings.path}: {facts.architecture}.expert_gating_func is {quote(number)};"
            " hmc reads 1 (softmax) and 2 (sigmoid)"
        )
    return names[number]
