"""Checks how a plan's weights are stored: names, sizes, and where in which shard they lie; hides
how formats pack numbers, and how a plan stores runs of experts.

sizes    a tensor has the bytes that its shape and format take, so have its scales
places   tensors lie inside their shards, behind the header, and share no bytes; those of a plan
         without shards lie nowhere
experts  a layer has gate, up and down, each a tensor an expert
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice
from math import prod
from operator import gt

from hmc.errors import VerifyError
from hmc.ops import Stored
from hmc.plan.model import ExpertWeights, Plan, Weight

_SCALES = {"F32": 4, "BF16": 2}
_MOST = 1 << 40
"""Elements of a weight that any machine could hold: beyond it, sizes are nonsense."""


@dataclass(frozen=True)
class _Layout:
    """How a format lies in memory: `bits` of an element, rows padded to `word` bytes; `rows` and
    `group` (0: as the weight says) elements share a scale (no rows: no scales), whose width the
    format leaves `open` or not."""

    bits: int
    word: int = 1
    rows: int = 0
    group: int = 0
    open: bool = False


_LAYOUTS: Mapping[str, _Layout] = {
    "f32": _Layout(32),
    "bf16": _Layout(16),
    "fp16": _Layout(16),
    "fp8": _Layout(8, rows=128, group=128),
    "int4": _Layout(4, word=4, rows=1, open=True),
}


def expected_bytes(weight: Weight | ExpertWeights) -> tuple[int, int]:
    """Bytes of a tensor and of its scales, of its shape and format; `VerifyError` where they have
    none."""
    layout, shape = _LAYOUTS[weight.format], weight.shape
    if not shape or min(shape) < 1 or prod(shape) > _MOST:
        raise VerifyError(f"weight {_name(weight)}: {list(shape)} is no shape")
    *first, columns = shape
    rows = prod(first)
    size = rows * -(-columns * layout.bits // (8 * layout.word)) * layout.word
    if not layout.rows:
        if weight.scale_dtype or weight.scale_bytes or weight.group:
            raise VerifyError(f"weight {_name(weight)}: {weight.format} has no scales")
        return size, 0
    scale = _SCALES.get(weight.scale_dtype)
    if scale is None or weight.group < 1 or layout.group not in (0, weight.group):
        raise VerifyError(
            f"weight {_name(weight)}: {weight.format} has no scales of {weight.scale_dtype or '?'}"
            f" in groups of {weight.group}"
        )
    return size, scale * -(-rows // layout.rows) * -(-columns // weight.group)


def stored_form(weight: Weight | ExpertWeights) -> Stored:
    """What kernels must know of how a weight is stored."""
    if not _LAYOUTS[weight.format].open:
        return Stored(weight.format)
    return Stored(weight.format, weight.group, 8 * _SCALES[weight.scale_dtype])


def is_plain(weight: Weight) -> bool:
    """Whether elements are numbers as they are, without scales."""
    return not _LAYOUTS[weight.format].rows


def check_weights(plan: Plan) -> None:
    """Raise `VerifyError` on the first weight that is not stored as its shape and format say."""
    names: set[str] = set()
    layers: dict[int, dict[str, ExpertWeights]] = {}
    places = _Places(plan)
    for weight in plan.weights:
        if weight.name in names or weight.name.startswith("layer:"):
            raise VerifyError(f"weight {weight.name}: two are called so, or none may be")
        names.add(weight.name)
        _check_sizes(weight)
        places.add(weight.name, ((1, weight.shard),), (weight.offset,), weight.bytes)
        if weight.scale_bytes:
            at = (weight.scale_offset,)
            places.add(weight.name, ((1, weight.scale_shard),), at, weight.scale_bytes)
        elif weight.scale_shard != -1 or weight.scale_offset:
            raise VerifyError(f"weight {weight.name}: scales that are none lie somewhere")
    for experts in plan.experts:
        _check_sizes(experts)
        if experts.role in layers.setdefault(experts.layer, {}):
            raise VerifyError(f"layer {experts.layer} has {experts.role} experts twice")
        layers[experts.layer][experts.role] = experts
        for runs, offsets, size in (
            (experts.shards, experts.offsets, experts.bytes),
            (experts.scale_shards, experts.scale_offsets, experts.scale_bytes),
        ):
            if len(offsets) != experts.count * bool(size) or _length(runs) != len(offsets):
                raise VerifyError(f"experts {experts.pattern}: columns are not one an expert")
            places.add(experts.pattern, runs, tuple(accumulate(offsets)), size)
    for layer, roles in layers.items():
        if len(roles) != 3 or len({each.count for each in roles.values()}) != 1:
            raise VerifyError(f"layer {layer}: its experts are not as many of gate, up and down")
    places.check()


def expand_runs(runs: tuple[tuple[int, int], ...]) -> Iterator[int]:
    """The values of run-length pairs (count, value), one by one."""
    for count, value in runs:
        for _ in range(count):
            yield value


def _name(weight: Weight | ExpertWeights) -> str:
    return weight.name if isinstance(weight, Weight) else weight.pattern


def _check_sizes(weight: Weight | ExpertWeights) -> None:
    size, scales = expected_bytes(weight)
    if (weight.bytes, weight.scale_bytes) != (size, scales):
        raise VerifyError(
            f"weight {_name(weight)}: {weight.format} {list(weight.shape)} takes {size} bytes and"
            f" {scales} of scales, not {weight.bytes} and {weight.scale_bytes}"
        )


def _length(runs: tuple[tuple[int, int], ...]) -> int:
    if any(count < 1 for count, _ in runs):
        raise VerifyError("a run of experts of no length")
    return sum(count for count, _ in runs)


class _Places:
    """Where tensors begin and end, by shard."""

    def __init__(self, plan: Plan) -> None:
        self._shards = plan.checkpoint.shards
        self._begins: list[list[int]] = [[] for _ in self._shards]
        self._ends: list[list[int]] = [[] for _ in self._shards]

    def add(
        self, name: str, runs: tuple[tuple[int, int], ...], offsets: tuple[int, ...], size: int
    ) -> None:
        """Tensors of `size` bytes at absolute `offsets`, in shards by run length."""
        first = 0
        for count, shard in runs:
            part = offsets[first : first + count]
            first += count
            if not self._shards and shard == -1 and not any(part):
                continue
            if not 0 <= shard < len(self._shards) or (
                min(part) < self._shards[shard].header_bytes
                or max(part) + size > self._shards[shard].size
            ):
                raise VerifyError(f"weight {name} lies outside its shard")
            self._begins[shard] += part
            self._ends[shard] += [each + size for each in part]

    def check(self) -> None:
        """No two tensors share bytes: then, and then only, is each end at or before the next
        beginning, when all of either are in order."""
        for number, shard in enumerate(self._shards):
            begins, ends = sorted(self._begins[number]), sorted(self._ends[number])
            if any(map(gt, ends, islice(begins, 1, None))):
                raise VerifyError(f"two weights of shard {shard.name} share bytes")
