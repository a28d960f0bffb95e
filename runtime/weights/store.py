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

Checkpoint layout is kernel layout, but for three things: scales in dtypes that kernels do not read
(`Plane.kept`: bf16 block scales of fp8, 1/16384 of the weights' size) are widened to f32; planes
that a format lays out by inputs (`Plane.layout`: AWQ, GPTQ) are laid out anew, and rows that lie
apart or as columns (`StoredPick`: stacks of experts) put beside each other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hmc.checkpoint.location import shard_paths
from hmc.checkpoint.mapped import MappedShards
from hmc.errors import CapacityError, UsageError
from hmc.formats import format_of, matrix_of
from hmc.formats.decode import NUMPY, decode, floats
from hmc.machine.detect import available_bytes, free_huge_pages
from hmc.machine.topology import Team
from hmc.plan import ExpertWeights, Plan, Weight
from hmc.plan.file import canonical_json
from hmc.plan.model import ExpertRole
from hmc.plan.stored import forms_of
from hmc.runtime.memory.blocks import HUGE_PAGE, Block, aligned
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.weights import arena
from hmc.runtime.weights.fill import Progress, fill_dummy, read_spans
from hmc.runtime.weights.placing import Placed, Regions, place
from hmc.runtime.weights.tensors import (
    Addresses,
    Key,
    TensorGroup,
    array_at,
    check_checkpoint,
    layout,
    tensor_groups,
)

Home = Literal["mapped", "arena", "shared"]
_MAPPED = (
    "weights lie in the page cache on the nodes that read them first; of those read before, workers"
    " reach about {:.0%} on other nodes: --home arena puts all where they are multiplied"
)
_LITTLE = 256 << 20
"""Bytes that every process may lay out for itself: scales of FP8, vectors."""
PROJECTIONS: tuple[ExpertRole, ...] = ("gate", "up", "down")
BIASES: tuple[ExpertRole, ...] = ("gate_bias", "up_bias", "down_bias")


class WeightStore:
    """Addresses of a plan's weights; valid until `close`. `arena` is the memory file that they are
    in, where other processes may attach it; `beside`, of mapped ones, that of what is laid out anew
    where that is much."""

    def __init__(
        self,
        plan: Plan,
        places: dict[Key, Addresses],
        owners: list[Block | MappedShards],
        home: str,
        told: str = "",
    ) -> None:
        """`told`: where memory of several NUMA nodes holds them, in words."""
        self.told = told
        self._weights = {weight.name: weight for weight in plan.weights}
        self._experts = {(e.layer, e.role): e for e in plan.experts}
        self._groups = tensor_groups(plan)
        self._several: dict[Key, Addresses] = {}
        self._places = places
        self._owners = owners
        self.home = home
        self.bytes = sum(len(group.shards) * group.form.stored_bytes for group in self._groups)
        shared = next((each for each in owners if isinstance(each, SharedBlock)), None)
        self.arena = None if home == "mapped" else shared
        self.beside = shared if home == "mapped" else None

    @staticmethod
    def open(
        plan: Plan,
        directory: Path | None,
        *,
        dummy: bool = False,
        home: Home = "mapped",
        progress: Progress | None = None,
        teams: tuple[Team, ...] = (),
    ) -> WeightStore:
        """Map, read or fake the weights of `plan`; what is not mapped lies on the NUMA nodes of the
        `teams` of workers that read it, where these are several.

        Raises `PlanMismatchError` when `directory` is not the checkpoint the plan was made from,
        `ShardError` when a shard is missing, `CapacityError` when copied or dummy weights do not
        fit the memory that is free now (nothing has been read then), and `UsageError` when there is
        no directory to read.
        """
        return WeightStore._open(plan, directory, dummy, home, progress, None, teams)

    @staticmethod
    def _open(
        plan: Plan,
        directory: Path | None,
        dummy: bool,
        home: Home,
        progress: Progress | None,
        beside: int | None,
        teams: tuple[Team, ...] = (),
    ) -> WeightStore:
        groups = tensor_groups(plan)
        shards: list[Path] = []
        if not dummy:
            if directory is None:
                raise UsageError("no checkpoint directory is given")
            check_checkpoint(plan, directory)
            shards = shard_paths(directory, [shard.name for shard in plan.checkpoint.shards])
            if home == "mapped":
                return _open_mapped(plan, groups, directory, shards, progress, beside, teams)
        kind = "dummy" if dummy else home
        block, places = _room(groups, f"{kind} weights", shared=home == "shared")
        with _closing_on_error(block):
            placed = _placed(block, groups, places, teams)
            if dummy:
                fill_dummy(groups, places, progress, placed)
            else:
                read_spans(groups, shards, places, progress, placed)
            if isinstance(block, SharedBlock):
                arena.keep(block, plan, kind)
        return WeightStore(plan, places, [block], kind, placed.told if placed else "")

    @staticmethod
    def attach(plan: Plan, descriptor: int) -> WeightStore:
        """The arena another process filled for the same weights, read-only; nothing is read, copied
        or converted. `descriptor` (its `arena.descriptor`, as this process has it) stays the
        caller's.

        Raises `PlanMismatchError` when it holds other weights, `ExecutionError` when it is no
        filled arena.
        """
        places, size = layout(tensor_groups(plan), arena.HEADER)
        block, home = arena.attach(plan, size, descriptor)
        return WeightStore(plan, _at(block, places), [block], home)

    def addresses(self, name: str) -> tuple[int, ...]:
        """Address of each plane of a weight; `KeyError` for an unknown name."""
        planes = self._weights[name].planes
        return tuple(int(self._places["weight", name, plane.name][0]) for plane in planes)

    def address(self, name: str) -> int:
        """Address of a weight's codes."""
        return self.addresses(name)[0]

    def scale_address(self, name: str) -> int:
        """Address of a weight's scales, 0 when it has none; where there are several planes beside
        the codes, of the addresses (i64) of all of them.
        """
        planes = [np.array([address]) for address in self.addresses(name)[1:]]
        return int(self._beside(("weight", name), 1, planes)[0])

    def weight(self, name: str) -> Weight:
        """What the plan says of a weight."""
        return self._weights[name]

    def has_biases(self, layer: int) -> bool:
        """Whether a layer's experts have biases."""
        return (layer, BIASES[-1]) in self._experts

    def expert_roles(self, layer: int) -> list[ExpertRole]:
        """What each of a layer's experts has, matrices before biases."""
        return [role for role in (*PROJECTIONS, *BIASES) if (layer, role) in self._experts]

    def experts(self, layer: int, role: ExpertRole) -> ExpertWeights:
        """What the plan says of a projection of a layer's experts."""
        return self._experts[layer, role]

    def expert_planes(self, layer: int, role: ExpertRole) -> list[Addresses]:
        """Addresses i64 [experts] of each plane of a projection of a layer's experts."""
        planes = self._experts[layer, role].planes
        return [self._places["expert", layer, role, plane.name] for plane in planes]

    def expert_table(self, layer: int) -> npt.NDArray[np.int64]:
        """Addresses i64 [experts, 6]: gate, gate scale, up, up scale, down, down scale; scales as
        `scale_address` has them, 0 for a gate that there is not.
        """
        count = self._experts[layer, "up"].count
        columns: list[Addresses] = []
        for role in PROJECTIONS:
            if (layer, role) not in self._experts:
                columns += [np.zeros(count, np.int64)] * 2
                continue
            codes, *planes = self.expert_planes(layer, role)
            columns += [codes, self._beside((layer, role), count, planes)]
        return np.stack(columns, axis=1)

    def _beside(self, key: Key, count: int, planes: list[Addresses]) -> Addresses:
        """Of `count` matrices the address of what lies beside their codes, see `scale_address`."""
        if len(planes) < 2:
            return planes[0] if planes else np.zeros(count, np.int64)
        if key not in self._several:
            self._several[key] = np.ascontiguousarray(np.stack(planes, axis=1), np.int64)
        table = self._several[key]
        return table.ctypes.data + table.strides[0] * np.arange(count, dtype=np.int64)

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

    def expert_vectors(self, layer: int, role: ExpertRole) -> npt.NDArray[np.float32]:
        """A vector of each of a layer's experts as f32 [experts, n]."""
        weights = self.experts(layer, role)
        (form,), (places,) = forms_of(weights), self.expert_planes(layer, role)
        each = [array_at(int(place), NUMPY[form.kept], form.shape) for place in places]
        return floats(np.stack(each), form.kept)

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """All elements of a plain weight as f32 [n], whatever its shape."""
        return self.rows(name, 0, matrix_of(self._weights[name].shape)[0]).reshape(-1)

    def close(self) -> None:
        """Give mappings and memory back; no address is valid after it."""
        for owner in self._owners:
            owner.close()
        self._owners, self._places = [], {}


@dataclass(frozen=True)
class Shared:
    """How another process opens the weights of a plan (its JSON): the arena behind a descriptor
    that it inherits under its number, or the shards of `directory`, which it maps itself."""

    plan: str
    directory: str | None
    arena: int | None
    beside: int | None = None

    @staticmethod
    def of(plan: Plan, store: WeightStore, directory: Path | None) -> Shared:
        """Of weights that are open here; `UsageError` where they are in private memory."""
        if store.arena is None and store.home != "mapped":
            raise UsageError(
                f"{store.home} weights in private memory cannot be shared with other processes:"
                ' open them with home="shared" (--home shared)'
            )
        path = None if directory is None else str(directory.absolute())
        files = (None if each is None else each.descriptor for each in (store.arena, store.beside))
        return Shared(canonical_json(plan), path, *files)

    @property
    def descriptors(self) -> list[int]:
        """What the other process has to inherit."""
        return [each for each in (self.arena, self.beside) if each is not None]

    def open(self) -> tuple[Plan, WeightStore]:
        """Over there: the plan and its weights; raises as `WeightStore.open` and `attach`."""
        plan = Plan.model_validate_json(self.plan)
        if self.arena is not None:
            return plan, WeightStore.attach(plan, self.arena)
        directory = None if self.directory is None else Path(self.directory)
        return plan, WeightStore._open(plan, directory, False, "mapped", None, self.beside)


def _open_mapped(
    plan: Plan,
    groups: list[TensorGroup],
    directory: Path,
    shards: list[Path],
    progress: Progress | None,
    beside: int | None,
    teams: tuple[Team, ...],
) -> WeightStore:
    """The shards mapped, and what memory holds otherwise read from them beside: where that is much
    in a memory file, so that other processes need not do it again, which have it as `beside`.
    """
    mapped = MappedShards(directory, plan.checkpoint.shards)
    with _closing_on_error(mapped):
        bases = np.array(mapped.addresses)
        places = {group.key: bases[group.shards] + group.offsets for group in groups}
        copied = [group for group in groups if group.copied]
        if beside is not None:
            anew, size = layout(copied, arena.HEADER)
            block: Block = arena.attach(plan, size, beside)[0]
            anew = _at(block, anew)
        else:
            block, anew = _room(copied, "weights laid out anew", shared=_much(copied))
            with _closing_on_error(block):
                placed = _placed(block, copied, anew, teams)
                read_spans(copied, shards, anew, progress, placed)
                if isinstance(block, SharedBlock):
                    arena.keep(block, plan, "mapped")
    told = _MAPPED.format(1 - 1 / len(teams)) if len(teams) > 1 else ""
    return WeightStore(plan, places | anew, [mapped, block], "mapped", told)


def _placed(
    block: Block,
    groups: list[TensorGroup],
    places: dict[Key, Addresses],
    teams: tuple[Team, ...],
) -> Placed | None:
    """A new block's pages on the nodes of several teams; None where there is one node."""
    if len({team.memory for team in teams}) < 2:
        return None
    return place(block, Regions.of(block, groups, places, teams), teams)


def _much(groups: list[TensorGroup]) -> bool:
    """Whether processes share what is laid out anew instead of each doing it for itself."""
    return sum(len(group.shards) * group.form.bytes for group in groups) > _LITTLE


def _room(
    groups: list[TensorGroup], purpose: str, *, shared: bool = False
) -> tuple[Block, dict[Key, Addresses]]:
    """A block that holds `groups`, and the address of each tensor; `CapacityError` when the memory
    free now is too small."""
    places, size = layout(groups, arena.HEADER if shared else 0)
    free, reserved = available_bytes(), free_huge_pages() * HUGE_PAGE if shared else 0
    if size > free and aligned(size, HUGE_PAGE) > reserved:
        there = f"{free / 2**30:.1f} GiB of memory"
        if shared:
            there += f" and {reserved / 2**30:.1f} GiB of reserved huge pages"
        raise CapacityError(
            f"{purpose}: {size / 2**30:.1f} GiB are needed, {there} are free: run fewer layers, or"
            " on a machine with more memory"
        )
    block = (SharedBlock if shared else Block)(size, purpose)
    return block, _at(block, places)


def _at(block: Block, places: dict[Key, Addresses]) -> dict[Key, Addresses]:
    return {key: block.address + begin for key, begin in places.items()}


@contextmanager
def _closing_on_error(owner: Block | MappedShards) -> Iterator[None]:
    try:
        yield
    except BaseException:
        owner.close()
        raise
