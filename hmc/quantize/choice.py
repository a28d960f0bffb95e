"""Which tensors of a checkpoint are encoded: the weights of its matmuls, but for the router's,
which must go on choosing alike, and the output layer's; and why others are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hmc import models
from hmc.checkpoint import Checkpoint, WeightSource
from hmc.errors import UnsupportedError
from hmc.graph import WeightSpec, meta
from hmc.ops import OPS
from hmc.passes.graph.trace import trace


@dataclass(frozen=True)
class Choice:
    """`encoded` are the weights that are, by the tensor of their codes; `dropped` names what else
    stood for them; `kept` every other linear weight's module with the reason.
    """

    encoded: Mapping[str, WeightSource]
    dropped: frozenset[str]
    kept: dict[str, str]


def choose(checkpoint: Checkpoint, columns: int, experts_only: bool) -> Choice:
    """Rows of what is encoded are whole multiples of `columns`. `UnsupportedError` where a weight
    that would have to stay is stored in few bits itself.
    """
    found: dict[str, WeightSource] = {}
    kept: dict[str, str] = {}
    model = models.load(checkpoint.config, tensors=checkpoint.tensors)
    for node in trace(model.module).graph.nodes:
        about, reason = meta(node), ""
        readers = [OPS.get(meta(user).kind) for user in node.users]
        if any(op is not None and op.family == "routing" for op in readers):
            reason = "chooses experts"
        elif about.section == "head":
            reason = "makes the logits"
        elif experts_only and not any(weight.experts for weight in about.weights):
            reason = "is no expert's (--experts-only)"
        op = OPS.get(about.kind)
        for weight in about.weights if op is not None and op.has_matmul else ():
            role = op.weight(weight.role) if op is not None else None
            if role is not None and role.matmul:
                for source in _sources(checkpoint, weight):
                    _sort(checkpoint, source, reason, columns, found, kept)
    names = {name for source in found.values() for name in source.tensor_names}
    return Choice(found, frozenset(names - found.keys()), kept)


def _sources(checkpoint: Checkpoint, weight: WeightSpec) -> list[WeightSource]:
    """Whole tensors, whatever the model takes of them."""
    if weight.view is not None and weight.name in checkpoint.tensors:
        shape = checkpoint.tensors[weight.name].shape
        return [checkpoint.resolve(weight.name, shape, linear=False)]
    if weight.experts:
        return checkpoint.resolve_experts(weight.name, weight.experts, weight.shape, weight.view)
    linear = weight.linear
    return [checkpoint.resolve(weight.name, weight.shape, linear=linear, view=weight.view)]


def _sort(
    checkpoint: Checkpoint, source: WeightSource, reason: str, columns: int,
    found: dict[str, WeightSource], kept: dict[str, str],
) -> None:  # fmt: skip
    module, codes = source.name.removesuffix(".weight"), source.tensors[0].name
    if source.shape[-1] % columns:
        reason = reason or f"has {source.shape[-1]} columns, no multiple of {columns}"
    if module in kept:
        return
    if not reason:
        found[codes] = source
        return
    if len(source.tensors) > 1:
        raise UnsupportedError(
            f"{checkpoint.directory}: {codes} {reason}, and is quantised already ({source.note}):"
            " a copy has one format; leave that out, or take the model's original weights"
        )
    kept[module] = reason
    found.pop(codes, None)
