"""Where the planes of one parameter lie, in which format; and why.

`StoredWeights` finds them among the tensors of a checkpoint and refuses whatever does not fit
together. `InventedWeights` answers for a config.json alone, in the format that configuration
implies, so that a model can be planned and timed before its weights are downloaded. Which tensors a
format has, of which names, dtypes and shapes, stands in its row (hmc/formats).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Protocol

from hmc.checkpoint.headers import Shard, TensorInfo
from hmc.checkpoint.jsonfile import first_few
from hmc.checkpoint.quantization import Quantization
from hmc.checkpoint.views import Stack, View, rows_of
from hmc.errors import TensorError
from hmc.formats import DTYPE_BITS, FORMATS, Format, Storage, format_of, matrix_of

INVENTED = -1
"""`TensorInfo.shard` of a tensor that no file holds."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A parameter found: the `tensors` of its planes, in the order of its format's row.

    `group` is the number of columns that share a scale, where the format leaves that open, else 0;
    `beside` names tensors that belong to it and hold nothing that is needed; `note` is the reason
    for the format, in a few words for a plan.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    group: int
    tensors: tuple[TensorInfo, ...]
    beside: tuple[str, ...]
    note: str

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Stored dtype of each plane."""
        return tuple(tensor.dtype for tensor in self.tensors)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that this weight accounts for."""
        return (*(tensor.name for tensor in self.tensors), *self.beside)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all planes."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Weights(Protocol):
    """Answers where a parameter is; `TensorError` if it is not, or not as asked for."""

    def find(
        self,
        name: str,
        shape: tuple[int, ...],
        linear: bool,
        view: View | None = None,
        expert: int = 0,
    ) -> WeightSource: ...

    def missing(self, names: Iterable[str]) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Weights among the `tensors` of a directory's `shards`."""

    directory: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    quantization: Quantization

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that no tensor stands for."""
        ends = {suffix for row in FORMATS.values() for suffix in row.codes.suffixes}
        return [name for name in names if not any(name + end in self.tensors for end in ends)]

    def find(
        self,
        name: str,
        shape: tuple[int, ...],
        linear: bool,
        view: View | None = None,
        expert: int = 0,
    ) -> WeightSource:
        """The tensors of one parameter, checked against `shape`, each other and the config; with a
        `view` the part of them that it is, of a stack that of `expert`.
        """
        if view is not None:
            whole = self
            if view.stacked:
                whole = replace(self, tensors=Stack(self.tensors, expert, view.shape[0]))
            found = whole.find(name, view.shape[-2:], linear)
            parts = rows_of(found.tensors, found.format, found.group, view.first, shape)
            return replace(found, name=view.of(name, shape[0]), shape=shape, tensors=parts)
        data = self.tensors.get(name)
        candidates = [
            (row, codes)
            for row in FORMATS.values()
            for suffix in row.codes.suffixes
            if (row.scales and (codes := self.tensors.get(name + suffix)) is not None)
            and (suffix or codes.dtype in row.codes.dtypes)
        ]
        if candidates:
            # What the configuration speaks of, where several formats name their codes alike.
            wanted = self.quantization.format
            row, codes = next(
                (each for each in candidates if each[0].name == wanted), candidates[0]
            )
            if data is not None and codes != data:
                raise self._error(codes, f"stands beside {name}: only one of them can count")
            return self._quantised(row, codes, name, shape, linear)
        if data is None:
            raise TensorError(f"{self.directory}: tensor {name} is missing")
        self._check_shape(data, shape)
        return self._plain(data, shape, linear)

    def _plain(self, data: TensorInfo, shape: tuple[int, ...], linear: bool) -> WeightSource:
        plain = {dtype: row for row in FORMATS.values() if not row.scales
                 for dtype in row.codes.dtypes}  # fmt: skip
        if data.dtype not in plain:
            named = [dtype for row in FORMATS.values() if row.scales and "" in row.codes.suffixes
                     for dtype in row.codes.dtypes]  # fmt: skip
            raise self._error(data, f"is {data.dtype}; hmc reads {', '.join((*plain, *named))}")
        ends = [end for row in FORMATS.values() for plane in row.scales for end in plane.suffixes]
        for end in ends:
            scale = self.tensors.get(data.name + end)
            if scale is not None:
                raise self._error(data, f"is {data.dtype}, yet {scale.name} holds scales for it")
        note = _plain_note(data.dtype, linear, self.quantization, data.name)
        return WeightSource(data.name, shape, plain[data.dtype].name, 0, (data,), (), note)

    def _quantised(
        self, row: Format, codes: TensorInfo, name: str, shape: tuple[int, ...], linear: bool
    ) -> WeightSource:
        quantization, storage = self.quantization, self.quantization.storage
        what = codes.dtype if codes.name == name else "packed"
        if not linear:
            raise self._error(codes, f"is {what}, but hmc reads only linear weights in {row.title}")
        if storage is None or storage.format != row.name:
            raise self._error(
                codes, f"is {what}, but config.json has no {row.title} quantization_config"
            )
        if quantization.skip_key and quantization.skips(_module(name)):
            raise self._error(
                codes, f"is {what}, but {quantization.skip_key} in config.json lists it"
            )
        if problem := _cut_groups(row, storage, shape):
            raise self._error(codes, problem)
        tensors = []
        for plane, suffix in zip(row.planes, storage.suffixes, strict=True):
            tensor = self._beside(codes, what, name + suffix)
            self._check_dtype(tensor, plane.dtypes)
            self._check_shape(tensor, plane.stored_shape(shape, storage.group, tensor.dtype))
            tensors.append(tensor)
        for suffix, dtypes, wanted in storage.beside:
            other = self._beside(codes, what, name + suffix)
            self._check_dtype(other, dtypes)
            self._check_shape(other, wanted)
        return _source(row, storage, name, shape, tensors)

    def _beside(self, codes: TensorInfo, what: str, name: str) -> TensorInfo:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise self._error(codes, f"is {what}, but {name} is missing")
        return tensor

    def _check_shape(self, tensor: TensorInfo, wanted: tuple[int, ...]) -> None:
        if tensor.shape != wanted:
            raise self._error(
                tensor, f"has shape {list(tensor.shape)}, config.json implies {list(wanted)}"
            )

    def _check_dtype(self, tensor: TensorInfo, wanted: tuple[str, ...]) -> None:
        if tensor.dtype not in wanted:
            raise self._error(tensor, f"is {tensor.dtype}, must be {' or '.join(wanted)}")

    def _error(self, tensor: TensorInfo, problem: str) -> TensorError:
        path = self.directory / self.shards[tensor.shard].name
        return TensorError(f"{path}: tensor {first_few([tensor.name])} {problem}")


@dataclass(frozen=True, slots=True)
class InventedWeights:
    """Every weight asked for, in the format `quantization` implies or else in `dtype`.

    The tensors lie in shard `INVENTED` at offset 0: sizes are real, places are not.
    """

    dtype: str
    quantization: Quantization

    def missing(self, names: Iterable[str]) -> list[str]:
        """Nothing is: what is asked for is invented."""
        return []

    def find(
        self,
        name: str,
        shape: tuple[int, ...],
        linear: bool,
        view: View | None = None,
        expert: int = 0,
    ) -> WeightSource:
        """A weight of the shape asked for."""
        name = view.of(name, shape[0]) if view else name
        quantization, storage = self.quantization, self.quantization.storage
        if not linear or storage is None or quantization.skips(_module(name)):
            row = next(each for each in FORMATS.values() if self.dtype in each.codes.dtypes)
            note = _plain_note(self.dtype, linear, quantization, name)
            alone = (_invented(name, self.dtype, shape),)
            return WeightSource(name, shape, row.name, 0, alone, (), note)
        like = _like(storage, shape)  # thousands of experts are alike but for their names
        if isinstance(like, str):
            raise TensorError(f"tensor {name} {like}")
        tensors = tuple(replace(each, name=name + each.name) for each in like.tensors)
        beside = tuple(name + each for each in like.beside)
        return replace(like, name=name, tensors=tensors, beside=beside)


@cache
def _like(storage: Storage, shape: tuple[int, ...]) -> WeightSource | str:
    """An invented weight without a name, or what is wrong with one of this shape."""
    row = format_of(storage.format)
    if problem := _cut_groups(row, storage, shape):
        return problem
    tensors = [
        _invented(suffix, dtype, plane.stored_shape(shape, storage.group, dtype))
        for plane, suffix in zip(row.planes, storage.suffixes, strict=True)
        for dtype in plane.dtypes[:1]
    ]
    return _source(row, storage, "", shape, tensors)


def _source(
    row: Format, storage: Storage, name: str, shape: tuple[int, ...], tensors: list[TensorInfo]
) -> WeightSource:
    note = row.note(storage.group, [tensor.dtype for tensor in tensors])
    beside = tuple(name + suffix for suffix, _, _ in storage.beside)
    return WeightSource(name, shape, row.name, storage.group, tuple(tensors), beside, note)


def _cut_groups(row: Format, storage: Storage, shape: tuple[int, ...]) -> str:
    """What is wrong where rows are not whole groups and must be, else ""."""
    if len(shape) != 2:
        raise ValueError(f"a linear weight has two dimensions, one was asked for as {shape}")
    _, columns = matrix_of(shape)
    if row.whole_groups(columns, storage.group):
        return ""
    return f"has {columns} input columns, no multiple of group_size {storage.group}"


def _plain_note(dtype: str, linear: bool, quantization: Quantization, name: str) -> str:
    if quantization.storage is None:
        return f"{dtype}: the checkpoint is not quantised"
    if not linear:
        return f"{dtype}: not the weight of a linear layer"
    if quantization.skips(_module(name)):
        return (
            f"{dtype}: listed in {quantization.skip_key or 'the default of modules_to_not_convert'}"
        )
    return f"{dtype}: stored unquantised, though no list says so"


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _invented(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, INVENTED, dtype, shape, 0, prod(shape) * DTYPE_BITS[dtype] // 8)
