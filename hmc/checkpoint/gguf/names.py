"""From the tensors of GGUF files to those that a family's module asks for: each expert, and each of
two projections that lie in one tensor, is a tensor of its own by its published name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from hmc.checkpoint.gguf.families import Flat, GgufFamily, Piece
from hmc.checkpoint.headers import TensorInfo
from hmc.checkpoint.jsonfile import quote
from hmc.checkpoint.source import Part
from hmc.errors import TensorError
from hmc.formats import DTYPE_BITS, WIDE
from hmc.formats.ggml import GGML_TYPES

_LAYER = re.compile(r"blk\.(\d+)\.((?:(?:nextn|indexer|shortconv)\.)?\w+?)(?:\.(\d+))?((?:\.\w+)?)")


@dataclass(frozen=True)
class Published:
    """`tensors` by published names; one that the family does not know keeps its own, and so do
    those that others are put together from, `parts` by the name of the whole.
    """

    tensors: Mapping[str, TensorInfo]
    parts: Mapping[str, tuple[Part, ...]]


def published(
    family: GgufFamily, tensors: Iterable[TensorInfo], experts: int, where: str
) -> Published:
    """The tensors as a family's module asks for them. Stacks are of `experts`.

    Raises `TensorError`, after `where`, for one that is not what its name says, and for two that
    would be called alike.
    """
    found: dict[str, TensorInfo] = {}
    parts: dict[str, dict[int, Part]] = {}
    order = {key: place for place, key in enumerate(family.tensors)}
    for tensor in tensors:
        key, layer, expert, end = _key(family, tensor.name)
        target = family.tensors.get(key, tensor.name)
        if isinstance(target, Piece):
            whole = target.target.replace("{n}", layer)
            parts.setdefault(whole, {})[order[key]] = _part(tensor, target.transposed, where)
            named = [tensor]
        elif isinstance(target, Flat):
            whole = target.target.replace("{n}", layer)
            named = [replace(tensor, name=whole, shape=(prod(tensor.shape),))]
        elif key in family.tensors:
            targets = (target,) if isinstance(target, str) else target
            names = [each.replace("{n}", layer) + end for each in targets]
            named = list(_split(tensor, names, expert, experts, where))
        else:
            named = [tensor]
        for each in named:
            if each.name in found:
                raise TensorError(f"{where}: tensor {quote(tensor.name)}: another is {each.name}")
            found[each.name] = each
    wholes = {name: tuple(each[at] for at in sorted(each)) for name, each in parts.items()}
    for name, pieces in wholes.items():
        if name in found:
            raise TensorError(f"{where}: tensor {quote(pieces[0].tensor.name)}: another is {name}")
        found[name] = _whole(name, pieces, where)
    return Published(found, wholes)


def _key(family: GgufFamily, name: str) -> tuple[str, str, str, str]:
    """The family's key for a name, with its layer, its expert and its end, "" where it has none."""
    layer = expert = ""
    key = name
    if match := _LAYER.fullmatch(name):
        layer, expert = match[1], match[3] or ""
        key = f"blk.{{n}}.{match[2]}{'.{e}' if expert else ''}{match[4]}"
    if key in family.tensors:
        return key, layer, expert, ""
    stem, dot, last = key.rpartition(".")
    return stem, layer, expert, dot + last


def _split(
    tensor: TensorInfo, names: list[str], expert: str, experts: int, where: str
) -> Iterator[TensorInfo]:
    """The tensors that lie in one: each expert's of a stack, and of it the rows of each name."""
    for place, name in enumerate(names):
        if "{e}" not in name or expert:
            yield _rows(tensor, place, len(names), name.replace("{e}", expert), where)
            continue
        if len(tensor.shape) < 2 or tensor.shape[0] != experts:
            raise TensorError(
                f"{where}: tensor {quote(tensor.name)} has shape {list(tensor.shape)},"
                f" {experts} experts are stacked"
            )
        size = tensor.nbytes // experts
        for number in range(experts):
            one = replace(
                tensor, shape=tensor.shape[1:], offset=tensor.offset + number * size, nbytes=size
            )
            yield _rows(one, place, len(names), name.replace("{e}", str(number)), where)


def _part(tensor: TensorInfo, transposed: bool, where: str) -> Part:
    if len(tensor.shape) != 3:
        raise TensorError(
            f"{where}: tensor {quote(tensor.name)} has shape {list(tensor.shape)}, it is one matrix"
            " a head"
        )
    rows, columns = tensor.shape[1], columns_of(tensor)
    return Part(tensor, columns if transposed else rows, transposed)


def _whole(name: str, parts: tuple[Part, ...], where: str) -> TensorInfo:
    """The matrix that parts make: of their dtype where they share a plain one, else of f32."""
    first = parts[0].tensor
    heads, columns = first.shape[0], _across(parts[0])
    for part in parts:
        if (part.tensor.shape[0], _across(part)) != (heads, columns):
            raise TensorError(
                f"{where}: tensors {quote(first.name)} and {quote(part.tensor.name)} are not of one"
                f" matrix: shapes {list(first.shape)} and {list(part.tensor.shape)}"
            )
    dtypes = {part.tensor.dtype for part in parts}
    (dtype,) = dtypes if len(dtypes) == 1 and not is_blocks(first) else (WIDE,)
    shape = heads * sum(part.rows for part in parts), columns
    nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
    return TensorInfo(name, first.shard, dtype, shape, first.offset, nbytes)


def _across(part: Part) -> int:
    """Columns of the matrix that a part is of."""
    return part.tensor.shape[1] if part.transposed else columns_of(part.tensor)


def _rows(tensor: TensorInfo, place: int, parts: int, name: str, where: str) -> TensorInfo:
    """Part `place` of the rows of a tensor, under another name."""
    if parts == 1:
        return replace(tensor, name=name)
    rows, *others = tensor.shape
    if rows % parts:
        raise TensorError(f"{where}: tensor {quote(tensor.name)}: {rows} rows are no {parts} parts")
    size = tensor.nbytes // parts
    return replace(
        tensor,
        name=name,
        shape=(rows // parts, *others),
        offset=tensor.offset + place * size,
        nbytes=size,
    )


_TYPES = {kind.dtype: kind for kind in GGML_TYPES.values()}


def columns_of(tensor: TensorInfo) -> int:
    """Weights of a row, which of blocks is one of bytes."""
    kind = _TYPES[tensor.dtype]
    return tensor.shape[-1] // kind.bytes * kind.block if is_blocks(tensor) else tensor.shape[-1]


def is_blocks(tensor: TensorInfo) -> bool:
    """Whether a tensor is of a type of blocks."""
    return _TYPES[tensor.dtype].block > 1
