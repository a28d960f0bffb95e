"""Where the weights are: addresses of every tensor of a plan, from one of four homes; hides
mapping, copying, faking.

    mapped   the shards themselves in the page cache: nothing copied, shared by all processes;
             instant start, but for fp8 on tiers that have it checked (host/nan_scan.py)
    arena    read once into private memory of huge pages, every tensor 64-byte aligned: the fastest
             to read
    shared   the same in a memory file (of huge pages where the system gives them to such files:
             `arena.pages` says; elsewhere slower to fill and to read): can be pinned, takes its
             memory once for all processes that attach it
    dummy    no shard data: random weights of the real shapes, for benchmarks; in a memory file when
             made with the home "shared", else private

Checkpoint layout is kernel layout. One thing alone is converted: scales in dtypes that kernels do
not read (`Plane.kept`: bf16 block scales of fp8, 1/16384 of the weights' size) are widened to f32.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hmc.checkpoint.mapped import MappedShards
from hmc.errors import CapacityError, UsageError
from hmc.formats import format_of, forms_of
from hmc.formats.decode import NUMPY, decode
from hmc.machine.detect import available_bytes
from hmc.plan import ExpertWeights, Plan, Weight
from hmc.runtime.memory.blocks import Block
from hmc.runtime.weights.arena import WeightArena
from hmc.runtime.weights.fill import Progress, copy_spans, fill_dummy, read_spans
from hmc.runtime.weights.tensors import (
    Addresses,
    Key,
    TensorGroup,
    check_checkpoint,
    expert_key,
    layout,
    tensor_groups,
    weight_key,
)

__all__ = ["Home", "Progress", "Role", "TensorGroup", "WeightStore", "array_at"]

Home = Literal["mapped", "arena", "shared"]
Role = Literal["gate", "up", "down"]

_ROLES: tuple[Role, ...] = ("gate", "up", "down")


class WeightStore:
    """Addresses of a plan's weights; valid until `close`."""

    def __init__(
        self,
        plan: Plan,
        groups: list[TensorGroup],
        places: dict[Key, Addresses],
        owners: list[Block | MappedShards | WeightArena],
        home: str,
    ) -> None:
        self._weights = {weight.name: weight for weight in plan.weights}
        self._experts = {(e.layer, e.role): e for e in plan.experts}
        self._groups = groups
        self._places = places
        self._owners = owners
        self.home = home
        self.bytes = sum(len(group.shards) * group.nbytes for group in groups)
        self.arena = next((each for each in owners if isinstance(each, WeightArena)), None)

    @staticmethod
    def open(
        plan: Plan,
        directory: Path | None,
        *,
        dummy: bool = False,
        home: Home = "mapped",
        progress: Progress | None = None,
    ) -> WeightStore:
        """Map, read or fake the weights of `plan`.

        Raises `PlanMismatchError` when `directory` is not the checkpoint the plan was made from,
        `ShardError` when a shard is missing, `CapacityError` when copied or dummy weights do not
        fit the memory that is free now (nothing has been read then), and `UsageError` when there is
        no directory to read.
        """
        groups = tensor_groups(plan)
        if dummy:
            return _open_dummy(plan, groups, home, progress)
        if directory is None:
            raise UsageError("no checkpoint directory is given")
        check_checkpoint(plan, directory)
        if home == "mapped":
            return _open_mapped(plan, groups, directory, progress)
        shards = [directory / shard.name for shard in plan.checkpoint.shards]
        if home == "arena":
            return _open_private(plan, groups, shards, progress)
        with WeightArena.create(plan, groups, home) as arena:
            read_spans(groups, shards, arena.places, progress)
            arena.keep()
        return WeightStore(plan, groups, arena.places, [arena], home)

    @staticmethod
    def attach(plan: Plan, descriptor: int) -> WeightStore:
        """The arena another process filled for the same weights, read-only; nothing is read, copied
        or converted. `descriptor` (its `arena.descriptor`, as this process has it) stays the
        caller's.

        Raises `PlanMismatchError` when it holds other weights, `ExecutionError` when it is no
        filled arena.
        """
        groups = tensor_groups(plan)
        arena = WeightArena.attach(plan, groups, descriptor)
        return WeightStore(plan, groups, arena.places, [arena], arena.home)

    def addresses(self, name: str) -> tuple[int, ...]:
        """Address of each plane of a weight; `KeyError` for an unknown name."""
        planes = self._weights[name].planes
        return tuple(int(self._places[weight_key(name, plane.name)][0]) for plane in planes)

    def address(self, name: str) -> int:
        """Address of a weight's codes."""
        return self.addresses(name)[0]

    def scale_address(self, name: str) -> int:
        """Address of a weight's scales, 0 when it has none."""
        return next(iter(self.addresses(name)[1:]), 0)

    def weight(self, name: str) -> Weight:
        """What the plan says of a weight."""
        return self._weights[name]

    def experts(self, layer: int, role: Role) -> ExpertWeights:
        """What the plan says of a projection of a layer's experts."""
        return self._experts[layer, role]

    def expert_planes(self, layer: int, role: Role) -> list[Addresses]:
        """Addresses i64 [experts] of each plane of a projection of a layer's experts."""
        planes = self._experts[layer, role].planes
        return [self._places[expert_key(layer, role, plane.name)] for plane in planes]

    def expert_table(self, layer: int) -> npt.NDArray[np.int64]:
        """Addresses i64 [experts, 6]: gate, gate scale, up, up scale, down, down scale (0 where
        there is no scale).
        """
        table = np.zeros((self._experts[layer, "gate"].count, 6), np.int64)
        for column, role in enumerate(_ROLES):
            for offset, places in enumerate(self.expert_planes(layer, role)[:2]):
                table[:, 2 * column + offset] = places
        return table

    def codes(self) -> Iterator[tuple[TensorGroup, Addresses]]:
        """The codes of every weight and where they are."""
        for group in self._groups:
            if group.form.plane is format_of(group.format).codes:
                yield group, self._places[group.key]

    def arrays(self, name: str) -> list[npt.NDArray[Any]]:
        """The planes of a weight in memory, as `formats.decode.NUMPY` holds them, without a copy;
        do not write, do not keep.
        """
        return [
            array_at(address, NUMPY[form.kept], form.shape)
            for form, address in zip(
                forms_of(self._weights[name]), self.addresses(name), strict=True
            )
        ]

    def rows(self, name: str, first: int, last: int) -> npt.NDArray[np.float32]:
        """Rows [first, last) of a matrix as f32 [n, K], whatever its format."""
        weight = self._weights[name]
        kept = [form.kept for form in forms_of(weight)]
        row = format_of(weight.format)
        return decode(row, self.arrays(name), kept, weight.shape, weight.group, first, last)

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """A vector as f32 [n]."""
        found: npt.NDArray[np.float32] = self.rows(name, 0, 1)[0]
        return found

    def close(self) -> None:
        """Give mappings and memory back; no address is valid after it."""
        for owner in self._owners:
            owner.close()
        self._owners, self._places = [], {}


def array_at(address: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """An array over memory at `address` that somebody else owns."""
    raw = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
    found: npt.NDArray[Any] = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
    return found


def _open_mapped(
    plan: Plan, groups: list[TensorGroup], directory: Path, progress: Progress | None
) -> WeightStore:
    shards = plan.checkpoint.shards
    mapped = MappedShards(directory, [(shard.name, shard.size) for shard in shards])
    try:
        bases = np.array([mapped.address(i, 0, s.size) for i, s in enumerate(shards)])
        source = {group.key: bases[group.shards] + group.offsets for group in groups}
        copied = [group for group in groups if group.widen]
        block, places = _private(copied, "scales")
        copy_spans(copied, source, places, progress)
    except BaseException:
        mapped.close()
        raise
    return WeightStore(plan, groups, source | places, [mapped, block], "mapped")


def _open_private(
    plan: Plan, groups: list[TensorGroup], shards: list[Path], progress: Progress | None
) -> WeightStore:
    block, places = _private(groups, "arena weights")
    try:
        read_spans(groups, shards, places, progress)
    except BaseException:
        block.close()
        raise
    return WeightStore(plan, groups, places, [block], "arena")


def _open_dummy(
    plan: Plan, groups: list[TensorGroup], home: Home, progress: Progress | None
) -> WeightStore:
    if home == "shared":
        with WeightArena.create(plan, groups, "dummy") as arena:
            fill_dummy(groups, arena.places, progress)
            arena.keep()
        return WeightStore(plan, groups, arena.places, [arena], "dummy")
    block, places = _private(groups, "dummy weights")
    fill_dummy(groups, places, progress)
    return WeightStore(plan, groups, places, [block], "dummy")


def _private(groups: list[TensorGroup], purpose: str) -> tuple[Block, dict[Key, Addresses]]:
    """A block that holds `groups`, and the address of each tensor."""
    offsets, total = layout(groups)
    free = available_bytes()
    if total > free:
        raise CapacityError(
            f"{purpose}: {total / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB of memory are"
            " free: run fewer layers, or on a machine with more memory"
        )
    block = Block(total, purpose)
    return block, {key: block.address + places for key, places in offsets.items()}
