"""Model families: `load(config)` builds the module a checkpoint describes, on the meta device.

A family is one file with `build(config)`, and one line in `FAMILIES`.
Nothing after tracing knows families: all a family decides is which blocks stand where, under the
checkpoint's own names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hmc.blocks import Block, Experts
from hmc.checkpoint.config import ModelConfig
from hmc.errors import UnsupportedError
from hmc.graph import WeightSpec
from hmc.models import deepseek_v3, mixtral, qwen3_moe
from hmc.plan import ModelInfo


@dataclass(frozen=True)
class Family:
    """How to build a family, and which tensors beyond its own its checkpoints hold (shell patterns
    of names); none, as most.
    """

    build: Callable[[ModelConfig], nn.Module]
    tolerated: Callable[[ModelConfig], tuple[str, ...]] = lambda config: ()


FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(deepseek_v3.build, deepseek_v3.tolerated),
    "kimi_k2": Family(deepseek_v3.build, deepseek_v3.tolerated),
    "mixtral": Family(mixtral.build),
    "qwen3_moe": Family(qwen3_moe.build),
}


@dataclass(frozen=True)
class Model:
    """A model on the meta device, its summary, and patterns of tensors that may stand unused in its
    checkpoint.
    """

    module: nn.Module
    info: ModelInfo
    tolerated: tuple[str, ...]


def load(config: ModelConfig) -> Model:
    """Build the model of a config.json; no weight is read and none is allocated.

    Raises `UnsupportedError` for a family or an option hmc does not know, `ConfigError` for values
    that contradict each other or are of the wrong type.
    """
    name = config.require_str("model_type")
    family = FAMILIES.get(name)
    if family is None:
        raise UnsupportedError(
            f"{config.path}: model_type {name!r} is not a family hmc knows"
            f" ({', '.join(sorted(FAMILIES))});"
            " a new one is a file in hmc/models and a line in FAMILIES"
        )
    with torch.device("meta"):
        module = family.build(config)
    return Model(module, _info(name, config, module), family.tolerated(config))


def weight_specs(module: nn.Module) -> dict[str, WeightSpec]:
    """Every weight of a model by checkpoint name (`{e}` in those of experts); a tied one once."""
    specs: dict[str, WeightSpec] = {}
    for path, block in module.named_modules():
        if isinstance(block, Block):
            for spec in block.weights(path):
                specs.setdefault(spec.key, spec)
    return specs


def _info(name: str, config: ModelConfig, module: nn.Module) -> ModelInfo:
    names = config.get_strs("architectures")
    routed = next((block for block in module.modules() if isinstance(block, Experts)), None)
    top_k = routed.top_k if routed else 0
    tied = config.get_bool("tie_word_embeddings", False)
    parameters = active = 0
    for spec in weight_specs(module).values():
        size = torch.Size(spec.shape).numel()
        parameters += size * max(spec.experts, 1)
        if spec.role == "table" and not tied:
            active += spec.shape[1]
        else:
            active += size * (top_k if spec.experts else 1)
    return ModelInfo(
        family=name,
        architecture=names[0] if names else name,
        hidden=config.require_int("hidden_size"),
        layers=config.require_int("num_hidden_layers"),
        vocab=config.require_int("vocab_size"),
        experts=routed.experts if routed else 0,
        top_k=top_k,
        context=config.require_int("max_position_embeddings", minimum=1),
        parameters=parameters,
        active_parameters=active,
        eos_token_ids=config.get_ints("eos_token_id"),
    )
