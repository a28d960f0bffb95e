"""References of ops as functions: what a device computes an op by where PyTorch has nothing faster
(runtime/device_ops), and what tests compare kernels with.

A reference knows nothing of where rows and states lie. It works on S sequences of T tokens each:
inputs and outputs are [S, T, width], states of a sequence [S, width].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]
Reference = Callable[[Mapping[str, Any], Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
"""(attributes, inputs, weights, states before) -> (outputs, states after), each by name."""

REFERENCES: dict[str, Reference] = {}
"""By op. Those of attention work on all positions at once, and are blocks alone."""
