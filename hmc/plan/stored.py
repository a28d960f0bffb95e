"""Checks how a plan's weights are stored: names, sizes, and where in which shard they lie; hides
how a plan stores runs of experts.

sizes    the planes of a weight have the bytes that its shape and format take
places   tensors lie inside their shards, behind the header, and share no bytes, but for planes of
         all rows, which parts of one tensor share; those of a plan without shards lie nowhere
experts  a layer has up and down, and gate or not, each a tensor an expert, and biases of all or of
         none
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, islice
from math import prod
from operator import gt

from hmc.errors import UnsupportedError, VerifyError
from hmc.formats import WIDE, Form, format_of, forms, matrix_of, told_by_dtype
from hmc.formats.layouts import AS_READ
from hmc.ops import Stored
from hmc.plan.model import (
    ExpertWeights,
    Plan,
    StoredPart,
    StoredPick,
    StoredPlane,
    Weight,
)

_PROJECTIONS = frozenset(("gate", "up", "down"))
_MOST = 1 << 40
"""Elements of a weight that any machine could hold: beyond it, sizes are nonsense."""


def forms_of(weight: Weight | ExpertWeights) -> tuple[Form, ...]:
    """The planes of a weight, in the order of its format's row; `UnsupportedError` where they are
    not those of its format, shape and group.
    """
    row = format_of(weight.format)
    names = [plane.name for plane in weight.planes]
    if names != [plane.name for plane in row.planes]:
        raise UnsupportedError(f"planes {', '.join(names)} are not those of {row.name}")
    return _forms(
        row.name, weight.shape, weight.group, tuple(plane.dtype for plane in weight.planes)
    )


@lru_cache(1 << 10)
def _forms(
    name: str, shape: tuple[int, ...], group: int, dtypes: tuple[str, ...]
) -> tuple[Form, ...]:
    """Weights of all layers are alike."""
    return forms(format_of(name), shape, group, dtypes)


def expected_bytes(weight: Weight | ExpertWeights) -> dict[str, int]:
    """Bytes of each plane of a weight of its shape and format; `VerifyError` where it has none."""
    shape = weight.shape
    if not shape or min(shape) < 1 or prod(shape) > _MOST:
        raise VerifyError(f"weight {_name(weight)}: {list(shape)} is no shape")
    try:
        return {form.plane.name: form.stored_bytes for form in forms_of(weight)}
    except UnsupportedError as error:
        raise VerifyError(f"weight {_name(weight)}: {error}") from error


def stored_form(weight: Weight | ExpertWeights) -> Stored:
    """What kernels must know of how a weight is stored."""
    return Stored.of(weight.format, weight.group, [plane.dtype for plane in weight.planes])


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
        for plane, form in zip(weight.planes, forms_of(weight), strict=True):
            for part in _parts(weight, plane) or (plane,):
                where = ((1, part.shard),), (part.offset,), part.bytes
                if plane.pick is None:
                    places.add(weight.name, *where, shared=not form.plane.rows)
                else:
                    places.add_picked(weight.name, *where[:2], form, plane.pick)
    for experts in plan.experts:
        _check_sizes(experts)
        if experts.role in layers.setdefault(experts.layer, {}):
            raise VerifyError(f"layer {experts.layer} has {experts.role} experts twice")
        layers[experts.layer][experts.role] = experts
        for column, form in zip(experts.planes, forms_of(experts), strict=True):
            offsets, runs = column.offsets, column.shards
            if len(offsets) != experts.count or _length(runs) != len(offsets):
                raise VerifyError(f"experts {experts.pattern}: columns are not one an expert")
            name, absolute = experts.pattern, tuple(accumulate(offsets))
            if column.pick is None:
                places.add(name, runs, absolute, column.bytes, shared=not form.plane.rows)
            else:
                places.add_picked(name, runs, absolute, form, column.pick)
    for layer, roles in layers.items():
        matrices = roles.keys() & _PROJECTIONS
        biases = {f"{role}_bias" for role in matrices}
        whole = matrices >= {"up", "down"} and roles.keys() - matrices in (set(), biases)
        if not whole or len({each.count for each in roles.values()}) != 1:
            raise VerifyError(f"layer {layer}: its experts are not as many of gate, up and down")
    places.check()


def picked_bytes(form: Form, pick: StoredPick) -> int:
    """Bytes of the whole plane of which a pick is made."""
    return form.stored_bytes // form.stored[0] * pick.rows


def picked_rows(form: Form, pick: StoredPick) -> tuple[range, ...]:
    """Which of its rows these are, in order."""
    count, first, step, run = form.stored[0], pick.first, pick.step, pick.run
    if run == 1:
        return (range(first, first + count * step, step),)
    runs = ((first + done // run * step, min(run, count - done)) for done in range(0, count, run))
    return tuple(range(begin, begin + length) for begin, length in runs)


def _parts(weight: Weight, plane: StoredPlane) -> tuple[StoredPart, ...]:
    """The parts of a plane, which are all of it and as large as their types say."""
    parts = plane.parts
    if not parts:
        return ()
    rows, columns = matrix_of(weight.shape)
    heads, left = divmod(rows, sum(part.rows for part in parts))
    if left or len(weight.planes) != 1 or plane.pick is not None:
        raise VerifyError(f"weight {weight.name}: its parts are no whole heads")
    for part in parts:
        if plane.dtype not in (part.dtype, WIDE):
            raise VerifyError(f"weight {weight.name}: {part.dtype} does not become {plane.dtype}")
        shape = part_shape(part, heads, columns)
        if (row := told_by_dtype().get(part.dtype)) is None:
            raise VerifyError(f"weight {weight.name}: no format has parts in {part.dtype}")
        try:
            (form,) = forms(row, shape, 0, (part.dtype,))
        except UnsupportedError as error:
            raise VerifyError(f"weight {weight.name}: a part: {error}") from error
        if form.stored_bytes != part.bytes:
            raise VerifyError(
                f"weight {weight.name}: a part of {list(shape)} in {part.dtype} takes"
                f" {form.stored_bytes} bytes, not {part.bytes}"
            )
    return parts


def part_shape(part: StoredPart, heads: int, columns: int) -> tuple[int, int]:
    """The matrix that a part is stored as, all heads one below the other."""
    if part.transposed:
        return heads * columns, part.rows
    return heads * part.rows, columns


def expand_runs(runs: tuple[tuple[int, int], ...]) -> Iterator[int]:
    """The values of run-length pairs (count, value), one by one."""
    for count, value in runs:
        for _ in range(count):
            yield value


def _name(weight: Weight | ExpertWeights) -> str:
    return weight.name if isinstance(weight, Weight) else weight.pattern


def _check_sizes(weight: Weight | ExpertWeights) -> None:
    expected = expected_bytes(weight)
    found = {plane.name: plane.bytes for plane in weight.planes}
    if found != expected:
        raise VerifyError(
            f"weight {_name(weight)}: {weight.format} {list(weight.shape)} takes"
            f" {_sizes(expected)}, not {_sizes(found)}"
        )


def _sizes(planes: dict[str, int]) -> str:
    return " and ".join(f"{size} bytes of {name}" for name, size in planes.items())


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
        self._shared: set[tuple[int, int, int]] = set()
        self._picked: dict[tuple[object, ...], set[int]] = {}

    def add_picked(
        self,
        name: str,
        runs: tuple[tuple[int, int], ...],
        offsets: tuple[int, ...],
        form: Form,
        pick: StoredPick,
    ) -> None:
        """Rows of larger planes, of which other weights may be others."""
        rows, size = picked_rows(form, pick), picked_bytes(form, pick)
        own = {row for some in rows for row in some}
        turned = pick.transposed and (
            form.plane.bits or form.plane.block[1] or form.plane.rows != form.plane.columns
        )
        apart = pick.run == 1 or pick.run <= pick.step
        if rows[-1][-1] >= pick.rows or turned or form.plane.layout is not AS_READ or not apart:
            raise VerifyError(f"weight {name}: its rows are not to be picked so")
        key = (runs, offsets, size, pick.rows, pick.transposed)
        others = self._picked.setdefault(key, set())
        if not own.isdisjoint(others):
            raise VerifyError(f"weight {name}: another has rows of it")
        if not others:
            self.add(name, runs, offsets, size)
        others |= own

    def add(
        self,
        name: str,
        runs: tuple[tuple[int, int], ...],
        offsets: tuple[int, ...],
        size: int,
        shared: bool = False,
    ) -> None:
        """Tensors of `size` bytes at absolute `offsets`, in shards by run length; `shared` ones may
        be those of another weight, but all of them.
        """
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
            if shared:
                part = tuple(each for each in part if (shard, each, size) not in self._shared)
                self._shared.update((shard, each, size) for each in part)
            self._begins[shard] += part
            self._ends[shard] += [each + size for each in part]

    def check(self) -> None:
        """No two tensors share bytes: then, and then only, is each end at or before the next
        beginning, when all of either are in order."""
        for number, shard in enumerate(self._shards):
            begins, ends = sorted(self._begins[number]), sorted(self._ends[number])
            if any(map(gt, ends, islice(begins, 1, None))):
                raise VerifyError(f"two weights of shard {shard.name} share bytes")
