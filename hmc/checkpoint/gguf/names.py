"""From the tensors of GGUF files to those that a family's module asks for: each expert, and each of
two projections that lie in one tensor, is a tensor of its own by its published name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from hmc.checkpoint.gguf.families import GgufFamily
from hmc.checkpoint.headers import TensorInfo
from hmc.checkpoint.jsonfile import quote
from hmc.errors import TensorError

_LAYER = re.compile(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?((?:\.\w+)?)")


def published(
    family: GgufFamily, tensors: Iterable[TensorInfo], experts: int, where: str
) -> dict[str, TensorInfo]:
    """The tensors by published names; one that the family does not know keeps its own. Stacks are
    of `experts`.

    Raises `TensorError`, after `where`, for one that is not what its name says, and for two that
    would be called alike.
    """
    found: dict[str, TensorInfo] = {}
    for tensor in tensors:
        for part in _parts(family, tensor, experts, where):
            if part.name in found:
                raise TensorError(f"{where}: tensor {quote(tensor.name)}: another is {part.name}")
            found[part.name] = part
    return found


def _parts(
    family: GgufFamily, tensor: TensorInfo, experts: int, where: str
) -> Iterator[TensorInfo]:
    stem, layer, expert = tensor.name, "", ""
    if match := _LAYER.fullmatch(tensor.name):
        layer, expert = match[1], match[3] or ""
        stem = f"blk.{{n}}.{match[2]}{'.{e}' if expert else ''}{match[4]}"
    end = ""
    if stem not in family.tensors:
        stem, dot, last = stem.rpartition(".")
        end = dot + last
    target = family.tensors.get(stem)
    if target is None:
        yield tensor
        return
    targets = (target,) if isinstance(target, str) else target
    for place, name in enumerate(targets):
        whole = name.replace("{n}", layer) + end
        if "{e}" not in name or expert:
            yield _rows(tensor, place, len(targets), whole.replace("{e}", expert), where)
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
            yield _rows(one, place, len(targets), whole.replace("{e}", str(number)), where)


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
