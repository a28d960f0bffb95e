"""Model families: `load(config)` builds the module a checkpoint describes, on the meta device.

A family is one file with a `build(config)` and a row that says how checkpoints of it are called and
what they hold (`Family`), and one line in `table.py`. Nothing after tracing knows families: all a
family decides is which blocks stand where.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from hmc.blocks import Block, Experts, Linear, publish
from hmc.checkpoint.config import ModelConfig
from hmc.errors import UsageError
from hmc.graph import WeightSpec
from hmc.models.family import Aside, Family, Limit
from hmc.models.table import FAMILIES, GROUP, all_families
from hmc.models.unknown import unknown_family
from hmc.plan import ModelInfo

__all__ = [
    "FAMILIES",
    "GROUP",
    "Aside",
    "Family",
    "Limit",
    "Model",
    "all_families",
    "load",
    "weight_specs",
]


@dataclass(frozen=True)
class Model:
    """A model on the meta device, its summary, and what its checkpoint may hold beside it."""

    module: nn.Module
    info: ModelInfo
    aside: tuple[Aside, ...]
    beyond: Limit | None = None
    """The limit that the context asked for goes beyond, where another model is built then."""


MOST_LAYERS = 4096
"""A config that says more is wrong, and building them would take for ever."""


_CONTEXT = ("max_position_embeddings", "model_max_length")


def load(
    config: ModelConfig, family: str = "", context: int = 0, tensors: Collection[str] = ()
) -> Model:
    """Build the model of a config.json; no weight is read and none is allocated. `family` reads it
    as one of that family, whatever its model_type; `context` is that which is asked for, if any;
    `tensors` are the names of those of the checkpoint, as far as they are known.

    Raises `UnsupportedError` for a family or an option hmc does not know, `ConfigError` for values
    that contradict each other or are of the wrong type, `UsageError` for a `family` that is none.
    """
    name = family or config.require_str("model_type")
    row = FAMILIES.get(name) or all_families().get(name)
    if row is None and family:
        raise UsageError(f"--family {family}: not one of {', '.join(sorted(all_families()))}")
    if row is None:
        raise unknown_family(config, all_families())
    text = config.text
    if (layers := text.get_int("num_hidden_layers", 0)) > MOST_LAYERS:
        raise text.error("num_hidden_layers", f"is {layers}; hmc builds {MOST_LAYERS} at most")
    build, limit, beyond = row.build, row.limit(text), None
    if limit is not None and limit.longer is not None and context > limit.tokens:
        build, limit, beyond = limit.longer, None, limit
    with torch.device("meta"):
        module = build(text)
    publish(module, row.names)
    _unstack(module, tensors)
    return Model(module, _info(row, text, module, limit), row.aside(text), beyond)


def _unstack(module: nn.Module, tensors: Collection[str]) -> None:
    """Let experts that a family stacks be one by one where the checkpoint has them so, as quantised
    files do that were written from linear layers.
    """
    owners = {name.rpartition(".")[0] for name in tensors}
    for path, block in module.named_modules():
        if isinstance(block, Experts) and block.stacked:
            stacked, block.stacked = block.stacked, {}
            first = block.stored(path)[0].name.replace("{e}", "0")
            if first.rpartition(".")[0] not in owners:
                block.stacked = stacked


def weight_specs(module: nn.Module) -> dict[str, WeightSpec]:
    """Every weight of a model by checkpoint name (`{e}` in those of experts); a tied one once."""
    specs: dict[str, WeightSpec] = {}
    for path, block in module.named_modules():
        if isinstance(block, Block):
            for spec in block.stored(path):
                specs.setdefault(spec.key, spec)
    return specs


def _info(row: Family, config: ModelConfig, module: nn.Module, limit: Limit | None) -> ModelInfo:
    names = config.get_strs("architectures")
    routed = next((block for block in module.modules() if isinstance(block, Experts)), None)
    top_k = routed.top_k if routed else 0
    tied = any(isinstance(block, Linear) and block.tied for block in module.modules())
    parameters = active = 0
    for spec in weight_specs(module).values():
        size = torch.Size(spec.shape).numel()
        parameters += size * max(spec.experts, 1)
        if spec.role == "table" and not tied:
            active += spec.shape[1]
        else:
            active += size * (top_k if spec.experts else 1)
    key = next((key for key in _CONTEXT if key in config), _CONTEXT[0])
    context = Limit(config.require_int(key, minimum=1), "")
    if limit is not None and limit.tokens < context.tokens:
        context = limit
    return ModelInfo(
        family=row.model_type,
        architecture=names[0] if names else row.model_type,
        hidden=config.require_int("hidden_size"),
        layers=config.depth,
        vocab=config.require_int("vocab_size"),
        experts=routed.experts if routed else 0,
        top_k=top_k,
        context=context.tokens,
        context_reason=context.reason,
        parameters=parameters,
        active_parameters=active,
        eos_token_ids=config.get_ints("eos_token_id"),
    )
