"""Every tensor of a plan: where it lies in the checkpoint, what it is as kernels read it, and
whether the checkpoint is still the one; hides how a plan stores runs of experts.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.checkpoint.headers import read_fingerprint
from hmc.checkpoint.location import is_gguf, shard_paths
from hmc.errors import PlanMismatchError, UsageError
from hmc.formats import Form, matrix_of
from hmc.plan import Plan, StoredPart, StoredPick
from hmc.plan.stored import forms_of
from hmc.runtime.memory.blocks import aligned

Key = tuple[str | int, ...]
"""A plane of a weight, ("weight", name, plane), or of a projection of a layer's experts, ("expert",
layer, role, plane)."""
Addresses = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TensorGroup:
    """One plane of a weight, or of one projection of all experts of a layer.

    Tensor i is `form.stored_bytes` at `offsets[i]` of shard `shards[i]`. `fan_in` is the K of the
    matmul, 0 for vectors, `rows` its outputs, 1 for vectors. `order` is the plane that says how the
    columns of this one are laid out anew.
    """

    key: Key
    format: str
    form: Form
    shards: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    fan_in: int = 0
    parts: tuple[StoredPart, ...] = ()
    pick: StoredPick | None = None
    order: TensorGroup | None = None
    rows: int = 1

    def name(self, number: int) -> str:
        """What tensor `number` is, for messages."""
        if self.key[0] == "weight":
            return f"{self.form.plane.name} of {self.key[1]}"
        return f"{self.form.plane.name} of expert {number} of layer {self.key[1]}, {self.key[2]}"

    @property
    def copied(self) -> bool:
        """Whether memory holds it otherwise than the checkpoint: wider, laid out anew, picked from
        rows, or put together from parts.
        """
        return bool(self.parts) or self.pick is not None or not self.form.as_stored


def tensor_groups(plan: Plan) -> list[TensorGroup]:
    """Every tensor the plan names, planes of a weight one after the other."""
    groups: list[TensorGroup] = []
    for w in plan.weights:
        fan_in, found = w.shape[-1] if len(w.shape) > 1 else 0, []
        rows, _ = matrix_of(w.shape)
        for place, form in zip(w.planes, forms_of(w), strict=True):
            key: Key = "weight", w.name, place.name
            shard, offset = place.shard, place.offset
            one = np.array([shard], np.int64), np.array([offset], np.int64)
            found.append(
                TensorGroup(key, w.format, form, *one, fan_in, place.parts, place.pick, rows=rows)
            )
        groups += with_order(found)
    for e in plan.experts:
        found, (rows, _) = [], matrix_of(e.shape)
        for column, form in zip(e.planes, forms_of(e), strict=True):
            key = ("expert", e.layer, e.role, column.name)
            shards, offsets = _expand(column.shards), np.cumsum(column.offsets)
            fan_in = e.shape[-1] if len(e.shape) > 1 else 0
            found.append(
                TensorGroup(
                    key, e.format, form, shards, offsets, fan_in, pick=column.pick, rows=rows
                )
            )
        groups += with_order(found)
    return groups


def with_order(planes: list[TensorGroup]) -> list[TensorGroup]:
    """The planes of a weight; those that its order lays out know it."""
    order = next((each for each in planes if each.form.plane.kind == "order"), None)
    return [
        replace(each, order=order) if each.form.plane.layout.ordered else each for each in planes
    ]


def array_at(address: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """An array over memory at `address` that somebody else owns."""
    raw = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
    found: npt.NDArray[Any] = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
    return found


def _expand(runs: tuple[tuple[int, int], ...]) -> npt.NDArray[np.int64]:
    counts, values = zip(*runs, strict=True)
    return np.repeat(np.array(values, np.int64), counts)


def layout(groups: list[TensorGroup], begin: int = 0) -> tuple[dict[Key, Addresses], int]:
    """Where each tensor begins when all are laid out one after the other at 64-byte boundaries from
    `begin` on, and where the last one ends.
    """
    places, end = {}, begin
    for group in groups:
        size = aligned(group.form.bytes)
        places[group.key] = end + size * np.arange(len(group.shards), dtype=np.int64)
        end += len(group.shards) * size
    return places, end


def weights_digest(plan: Plan) -> str:
    """A hash of all that decides what `layout` gives and which bytes go there: plans that differ
    elsewhere (machine, placement, limits) share it.
    """
    dumped = plan.model_dump(mode="json", include={"checkpoint", "weights", "experts"})
    del dumped["checkpoint"]["path"]
    return hashlib.sha256(json.dumps(dumped, sort_keys=True).encode()).hexdigest()


def check_checkpoint(plan: Plan, location: Path) -> None:
    """Raise `PlanMismatchError` naming the first file that is not as it was when the plan was made.

    Sizes and header hashes pin every offset; the data itself is not read. Absent shards are a
    `ShardError`, and a plan that was made without weights a `UsageError`.
    """
    if plan.checkpoint.dummy:
        raise UsageError(
            "this plan was made from a config.json without weights: run it with dummy weights,"
            " or compile the checkpoint"
        )
    if not is_gguf(location):  # whose header has the configuration, and a hash of it is below
        _check_config(plan, location / "config.json")
    shards = plan.checkpoint.shards
    for shard, path in zip(
        shards, shard_paths(location, [shard.name for shard in shards]), strict=True
    ):
        found = read_fingerprint(path, shard.header_bytes if is_gguf(location) else 0)
        if found.size != shard.size:
            raise PlanMismatchError(
                f"{path}: has {found.size} bytes, had {shard.size} when the plan was made:"
                " the checkpoint changed, compile it again"
            )
        if found.header_sha256 != shard.header_sha256:
            raise PlanMismatchError(
                f"{path}: its header differs from the one the plan was made for: the checkpoint"
                " changed, compile it again"
            )


def _check_config(plan: Plan, config: Path) -> None:
    try:
        digest = hashlib.sha256(config.read_bytes()).hexdigest()
    except OSError as error:
        raise PlanMismatchError(
            f"{config}: {error.strerror}: this is not the checkpoint the plan was made from"
        ) from error
    if digest != plan.checkpoint.config_sha256:
        raise PlanMismatchError(f"{config}: changed since the plan was made: compile it again")
