"""Where the weights are: addresses of every tensor of a plan, from one of three homes; hides
mapping, copying, faking.

    mapped   the shards themselves in the page cache: instant start, nothing copied, shared by all
             processes
    arena    copied once into huge pages, every tensor 64-byte aligned: reads faster, takes the
             memory for itself
    dummy    no shard data: random weights of the real shapes, for benchmarks

Checkpoint layout is kernel layout. One thing alone is converted: bf16 block scales of fp8 weights
are widened to f32 (1/16384 of the weights' size), because kernels read f32 scales.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from hmc.checkpoint.headers import read_fingerprint
from hmc.checkpoint.mapped import MappedShards
from hmc.detect import available_bytes
from hmc.errors import CapacityError, PlanMismatchError, UsageError
from hmc.plan import ExpertWeights, Plan, Weight
from hmc.runtime.fill import copy_spans, fill_dummy
from hmc.runtime.memory import Block, aligned

Home = Literal["mapped", "arena"]
Role = Literal["gate", "up", "down"]
Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is (bytes)."""

Addresses = npt.NDArray[np.int64]

_ROLES: tuple[Role, ...] = ("gate", "up", "down")
_TORCH = {
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "f32": torch.float32,
    "int4": torch.uint8,
}


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one shape and format: one plain weight, or one projection of all experts of a
    layer; or their scales.

    Tensor i is `nbytes` at `offsets[i]` of shard `shards[i]`. `format` is the stored one ("scale"
    for scales, then `widen` says that they are bf16 to be made f32). `fan_in` is the K of the
    matmul, 0 for vectors.
    """

    key: tuple[str | int, ...]
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


class WeightStore:
    """Addresses of a plan's weights; valid until `close`."""

    def __init__(
        self,
        plan: Plan,
        groups: list[TensorGroup],
        places: dict[tuple[str | int, ...], Addresses],
        owners: list[Block | MappedShards],
        home: str,
    ) -> None:
        self._weights = {weight.name: weight for weight in plan.weights}
        self._experts = {(e.layer, e.role): e for e in plan.experts}
        self._places = places
        self._owners = owners
        self.home = home
        self.bytes = sum(len(group.shards) * group.nbytes for group in groups)

    @staticmethod
    def open(
        plan: Plan,
        directory: Path | None,
        *,
        dummy: bool = False,
        home: Home = "mapped",
        progress: Progress | None = None,
    ) -> WeightStore:
        """Map, copy or fake the weights of `plan`.

        Raises `PlanMismatchError` when `directory` is not the checkpoint the plan was made from,
        `ShardError` when a shard is missing, `CapacityError` when a copy or dummy weights do not
        fit the memory that is free now, and `UsageError` when there is no directory to read.
        """
        groups = tensor_groups(plan)
        if dummy:
            return _open_dummy(plan, groups, progress)
        if plan.checkpoint.dummy:
            raise UsageError(
                "this plan was made from a config.json without weights: run it with dummy weights,"
                " or compile the checkpoint"
            )
        if directory is None:
            raise UsageError("no checkpoint directory is given")
        check_checkpoint(plan, directory)
        shards = plan.checkpoint.shards
        mapped = MappedShards(directory, [(shard.name, shard.size) for shard in shards])
        try:
            bases = np.array([mapped.address(i, 0, s.size) for i, s in enumerate(shards)])
            source = {group.key: bases[group.shards] + group.offsets for group in groups}
            copied = [group for group in groups if home == "arena" or group.widen]
            block, places = _layout(copied, f"{home} weights" if home == "arena" else "scales")
            copy_spans(copied, source, places, progress)
        except BaseException:
            mapped.close()
            raise
        if home == "arena":
            mapped.close()
            return WeightStore(plan, groups, places, [block], home)
        return WeightStore(plan, groups, source | places, [mapped, block], home)

    def address(self, name: str) -> int:
        """Address of a weight's data; `KeyError` for an unknown name."""
        return int(self._places["weight", name][0])

    def scale_address(self, name: str) -> int:
        """Address of a weight's scales (fp8: f32 [ceil(N/128), ceil(K/128)]; int4: as stored), 0
        when it has none.
        """
        found = self._places.get(("scale", name))
        return 0 if found is None else int(found[0])

    def weight(self, name: str) -> Weight:
        """What the plan says of a weight."""
        return self._weights[name]

    def experts(self, layer: int, role: Role) -> ExpertWeights:
        """What the plan says of a projection of a layer's experts."""
        return self._experts[layer, role]

    def expert_table(self, layer: int) -> npt.NDArray[np.int64]:
        """Addresses i64 [experts, 6]: gate, gate scale, up, up scale, down, down scale (0 where
        there is no scale).
        """
        count = self._experts[layer, "gate"].count
        table = np.zeros((count, 6), np.int64)
        for column, role in enumerate(_ROLES):
            table[:, 2 * column] = self._places["expert", layer, role]
            scales = self._places.get(("expert scale", layer, role))
            if scales is not None:
                table[:, 2 * column + 1] = scales
        return table

    def tensor(self, name: str) -> torch.Tensor:
        """A weight's data as PyTorch sees it, without a copy, in its stored format; do not write,
        do not keep.
        """
        weight = self._weights[name]
        shape = weight.shape if weight.format != "int4" else (weight.bytes,)
        return view(self.address(name), _TORCH[weight.format], shape)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a matrix as f32 [n, K], whatever its format: for PyTorch, a slice
        at a time.
        """
        weight = self._weights[name]
        columns = weight.shape[1]
        stored = self.tensor(name)
        if weight.format == "int4":
            words = stored.view(torch.int32).view(weight.shape[0], -1)[first:last]
            nibbles = words[..., None] >> torch.arange(0, 32, 4) & 15
            found = (nibbles - 8).flatten(1)[:, :columns].to(torch.float32)
        else:
            found = stored[first:last].to(torch.float32)
        if not weight.scale_dtype:
            return found
        rows = torch.arange(first, last) // (weight.group if weight.format == "fp8" else 1)
        return found * self._scales(weight)[rows].repeat_interleave(weight.group, 1)[:, :columns]

    def _scales(self, weight: Weight) -> torch.Tensor:
        """Scales as kernels read them, [row blocks, column blocks]."""
        per_row = weight.group if weight.format == "fp8" else 1
        shape = (-(-weight.shape[0] // per_row), -(-weight.shape[1] // weight.group))
        narrow = weight.format == "int4" and weight.scale_dtype == "BF16"
        kind = torch.bfloat16 if narrow else torch.float32
        return view(self.scale_address(weight.name), kind, shape)

    def close(self) -> None:
        """Give mappings and memory back; no address is valid after it."""
        for owner in self._owners:
            owner.close()
        self._owners, self._places = [], {}


def view(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over memory at `address` that somebody else owns."""
    count = int(np.prod(shape))
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype, count=count).view(shape)


def check_checkpoint(plan: Plan, directory: Path) -> None:
    """Raise `PlanMismatchError` naming the first file that is not as it was when the plan was made.

    Sizes and header hashes pin every offset; the data itself is not read. Absent shards are a
    `ShardError`.
    """
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
    key: tuple[str | int, ...],
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


def _layout(
    groups: list[TensorGroup], purpose: str
) -> tuple[Block, dict[tuple[str | int, ...], Addresses]]:
    """A block that holds `groups`, each tensor at a 64-byte boundary, and where each is."""
    total = sum(len(group.shards) * aligned(group.home_bytes) for group in groups)
    free = available_bytes()
    if total > free:
        raise CapacityError(
            f"{purpose}: {total / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB of memory are"
            " free: run fewer layers, or on a machine with more memory"
        )
    block = Block(total, purpose)
    places, end = {}, block.address
    for group in groups:
        size = aligned(group.home_bytes)
        places[group.key] = end + size * np.arange(len(group.shards), dtype=np.int64)
        end += len(group.shards) * size
    return block, places


def _open_dummy(plan: Plan, groups: list[TensorGroup], progress: Progress | None) -> WeightStore:
    block, places = _layout(groups, "dummy weights")
    fill_dummy(groups, places, progress)
    return WeightStore(plan, groups, places, [block], "dummy")
