"""References of ops as functions: what a device computes an op by where PyTorch has nothing faster
(runtime/device_ops), and what tests compare kernels with.

A reference knows nothing of where rows and states lie. It works on S sequences of T tokens each:
inputs and outputs are [S, T, width], states of a sequence [S, width].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hmc.blocks import hyper, recurrent
from hmc.blocks.dense import grouped_linear
from hmc.blocks.pointwise import pointwise
from hmc.ops.pointwise import rowwise

Tensors = Mapping[str, Tensor]
Reference = Callable[[Mapping[str, Any], Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
"""(attributes, inputs, weights, states before) -> (outputs, states after), each by name."""


def _pointwise(
    attrs: Mapping[str, Any], inputs: Tensors, weights: Tensors, states: Tensors
) -> tuple[Tensors, Tensors]:
    rows = {name: each.flatten(0, 1).float() for name, each in inputs.items()}
    vectors = {name: each.float() for name, each in weights.items()}
    sequences = len(next(iter(inputs.values())))
    found = pointwise(rowwise(attrs), rows | vectors)
    return {"y": found.reshape(sequences, -1, found.shape[1])}, states


REFERENCES: dict[str, Reference] = {
    "pointwise": _pointwise,
    "grouped_linear": grouped_linear,
    **hyper.REFERENCES,
    **recurrent.REFERENCES,
}
"""By op. Those of attention work on all positions at once, and are blocks alone."""
