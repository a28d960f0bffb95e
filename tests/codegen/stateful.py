"""Calls of kernels that keep a state a sequence, and what an op's reference makes of the same in
float64: tokens of the same slot are a sequence, in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from kernel_calls import address, filled, guarded, in_turn

from hmc.blocks.reference import REFERENCES
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec
from hmc.ops import OPS

Arrays = Mapping[str, np.ndarray]

SLOTS = {
    "one": [3] * 7,
    "apart": [5, 0, 2, 4],
    "runs": [1, 1, 1, 0, 0, 6, 2, 2, 2, 2],
    "again": [2, 2, 0, 0, 2, 1, 0, 2],
}
"""Which slot each token of a call has."""


def reference(
    op: str, attrs: Mapping[str, Any], inputs: Arrays, weights: Arrays, state: np.ndarray,
    slots: list[int],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(y, states after) in f64, of inputs [tokens, columns] and states [slots, ...]."""

    def exact(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, np.float64))

    after, y = np.asarray(state, np.float64), None
    given = {role: exact(array) for role, array in weights.items()}
    (name,) = (state.name for state in OPS[op].states(attrs))
    for slot in set(slots):
        rows = [token for token, each in enumerate(slots) if each == slot]
        before = {name: exact(after[slot]).reshape(1, -1)}
        sequence = {role: exact(array[rows])[None] for role, array in inputs.items()}
        made, kept = REFERENCES[op](attrs, sequence, given, before)
        if y is None:
            y = np.zeros((len(slots), made["y"].shape[-1]))
        y[rows] = made["y"][0].numpy()
        after[slot] = kept[name].numpy().reshape(after[slot].shape)
    assert y is not None
    return y, after


def run(
    jit: Jit, spec: KernelSpec, inputs: Arrays, weights: Arrays, state: np.ndarray,
    slots: list[int], workers: int = 1, chunk: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(y, states after) of a kernel, in calls of `chunk` tokens (0: one); inputs are padded rows,
    [tokens, columns + 1].
    """
    kept, sequence = guarded(state), np.array(slots, np.int32)
    y = filled((len(slots), spec["width"] + 2), np.float32)
    for start in range(0, len(slots), chunk or len(slots)):
        some = slice(start, start + (chunk or len(slots)))
        args = {role: address(array[some]) for role, array in inputs.items()}
        args |= {f"{role}_stride": array.shape[1] for role, array in inputs.items()}
        args |= {role: address(array) for role, array in weights.items()}
        tokens = guarded(sequence[some])
        args |= {"state": address(kept), "sequence": address(tokens), "tokens": len(tokens)}
        in_turn(jit, spec, workers, **args, y=address(y[some]), y_stride=y.shape[1])
    assert (y[:, spec["width"] :] == 77).all()
    return y[:, : spec["width"]].copy(), kept
