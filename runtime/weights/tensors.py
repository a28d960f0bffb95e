"""Every tensor of a plan: where it lies in the checkpoint, how large it is as kernels read it, and
whether the checkpoint is still the one; hides how a plan stores runs of experts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hmc.checkpoint.headers import read_fingerprint
from hmc.errors import PlanMismatchError, UsageError
from hmc.plan import ExpertWeights, Plan, Weight
from hmc.runtime.memory.blocks import aligned

Key = tuple[str | int, ...]
Addresses = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one shape and format: one plain weight, or one projection of all experts of a
    layer; or their scales.

    Tensor i is `nbytes` at `offsets[i]` of shard `shards[i]`. `format` is the stored one ("scale"
    for scales, then `widen` says that they are bf16 to be made f32). `fan_in` is the K of the
    matmul, 0 for vectors.
    """

    key: Key
    format: str
    nbytes: int
    shards: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    fan_in: int = 0
    widen: bool = False

    @property
    def home_bytes(self) -> int:
        """Bytes of one tensor as kernels read it."""
        return 2 * self.nbytes if self.widen else self.nbytes


def tensor_groups(plan: Plan) -> list[TensorGroup]:
    """Every tensor the plan names, weights before their scales."""
    groups = []
    for w in plan.weights:
        fan_in = w.shape[-1] if len(w.shape) > 1 else 0
        one = np.array([w.shard]), np.array([w.offset])
        groups.append(TensorGroup(("weight", w.name), w.format, w.bytes, *one, fan_in))
        if w.scale_dtype:
            one = np.array([w.scale_shard]), np.array([w.scale_offset])
            groups.append(_scales(("scale", w.name), w, *one, fan_in))
    for e in plan.experts:
        columns = _expand(e.shards, e.count), np.cumsum(e.offsets or (0,) * e.count)
        key = ("expert", e.layer, e.role)
        groups.append(TensorGroup(key, e.format, e.bytes, *columns, e.shape[-1]))
        if e.scale_dtype:
            columns = (
                _expand(e.scale_shards, e.count),
                np.cumsum(e.scale_offsets or (0,) * e.count),
            )
            groups.append(_scales(("expert scale", e.layer, e.role), e, *columns, e.shape[-1]))
    return groups


def _scales(
    key: Key,
    owner: Weight | ExpertWeights,
    shards: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    fan_in: int,
) -> TensorGroup:
    widen = owner.format == "fp8" and owner.scale_dtype == "BF16"
    name = f"{owner.format} scale"
    return TensorGroup(key, name, owner.scale_bytes, shards, offsets, fan_in, widen)


def _expand(runs: tuple[tuple[int, int], ...], count: int) -> npt.NDArray[np.int64]:
    if not runs:
        return np.full(count, -1, np.int64)
    counts, values = zip(*runs, strict=True)
    return np.repeat(np.array(values, np.int64), counts)


def layout(groups: list[TensorGroup]) -> tuple[dict[Key, Addresses], int]:
    """Where each tensor begins when all are laid out one after the other at 64-byte boundaries, and
    the bytes they take.
    """
    places, end = {}, 0
    for group in groups:
        size = aligned(group.home_bytes)
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


def check_checkpoint(plan: Plan, directory: Path) -> None:
    """Raise `PlanMismatchError` naming the first file that is not as it was when the plan was made.

    Sizes and header hashes pin every offset; the data itself is not read. Absent shards are a
    `ShardError`, and a plan that was made without weights a `UsageError`.
    """
    if plan.checkpoint.dummy:
        raise UsageError(
            "this plan was made from a config.json without weights: run it with dummy weights,"
            " or compile the checkpoint"
        )
    config = directory / "config.json"
    try:
        digest = hashlib.sha256(config.read_bytes()).hexdigest()
    except OSError as error:
        raise PlanMismatchError(
            f"{config}: {error.strerror}: this is not the checkpoint the plan was made from"
        ) from error
    if digest != plan.checkpoint.config_sha256:
        raise PlanMismatchError(f"{config}: changed since the plan was made: compile it again")
    for shard in plan.checkpoint.shards:
        path = directory / shard.name
        found = read_fingerprint(path)
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
