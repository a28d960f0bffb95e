"""How one parameter is found among the tensors of a checkpoint, or what contradicts what.

The configuration says which formats may be meant (`Quantization.storages_of`), the tensors that are
there decide between them: codes of the right name and dtype first, then scales that fit. Nothing is
read that the configuration does not speak of somewhere, and nothing that it keeps out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from hmc.checkpoint.headers import TensorInfo
from hmc.checkpoint.quantization import Quantization
from hmc.checkpoint.source import (
    Shape,
    WeightSource,
    coded,
    cut_groups,
    group_of,
    module_of,
    plain_note,
)
from hmc.errors import TensorError
from hmc.formats import FORMATS, Format, Storage, format_of, named, told_by_dtype


@dataclass(frozen=True, slots=True)
class Finder:
    """Finds parameters among `tensors`; `error` makes a `TensorError` of a tensor and what is wrong
    with it, `where` says in which checkpoint others are missing.
    """

    tensors: Mapping[str, TensorInfo]
    quantization: Quantization
    where: str
    error: Callable[[TensorInfo, str], TensorError]

    def find(self, name: str, shape: Shape, linear: bool) -> WeightSource:
        """The parameter `name` of logical `shape` (`Checkpoint.resolve`)."""
        meant = self.quantization.storages_of(module_of(name))
        if not any(self._codes(name, storage) for storage in meant):
            data = self.tensors.get(name)
            if data is not None and data.dtype in (rows := told_by_dtype()):
                return self._plain(rows[data.dtype], data, shape, linear)
        return self._coded(name, shape, linear, meant)

    def _codes(self, name: str, storage: Storage) -> TensorInfo | None:
        """The codes of a weight, if they are there as `storage` says."""
        codes = self.tensors.get(named(name, storage.suffixes[0]))
        fits = codes is not None and codes.dtype in format_of(storage.format).codes.dtypes
        return codes if fits else None

    def _plain(self, row: Format, data: TensorInfo, shape: Shape, linear: bool) -> WeightSource:
        if len(shape) == 2 and (problem := cut_groups(row, 0, shape)):
            raise self.error(data, problem)
        alone = len(shape) != len(data.shape) and _without_ones(shape) == _without_ones(data.shape)
        self._check_shape(data, row.codes.stored_shape(shape, 0, data.dtype), alone)
        ends = {end for each in FORMATS.values() for plane in each.scales for end in plane.suffixes}
        for end in sorted(ends):
            scale = self.tensors.get(named(data.name, end))
            if scale is not None and scale != data:
                raise self.error(data, f"is {data.dtype}, yet {scale.name} holds scales for it")
        note = row.about or plain_note(data.dtype, linear, self.quantization, data.name)
        return WeightSource(data.name, shape, row.name, 0, (data,), (), note)

    def _coded(
        self, name: str, shape: Shape, linear: bool, meant: tuple[Storage, ...]
    ) -> WeightSource:
        """A weight in codes, as the first of those that are meant, or else of others of the
        configuration, whose tensors are there and fit.
        """
        rest = (each for each in self.quantization.storages if each not in meant)
        present = [each for each in meant if self._codes(name, each)]
        present = present or [each for each in rest if self._codes(name, each)]
        if not present:
            raise self._unread(name)
        codes = self.tensors[named(name, present[0].suffixes[0])]
        title = format_of(present[0].format).title
        if codes.name != name and name in self.tensors:
            raise self.error(codes, f"stands beside {name}: only one of them can count")
        is_what = f"is {_what(codes, name)}, but"
        if not linear:
            raise self.error(codes, f"{is_what} hmc reads only linear weights in {title}")
        key = self.quantization.skip_key
        if key and self.quantization.skips(module_of(name)):
            raise self.error(codes, f"{is_what} {key} in config.json lists it")
        problem: TensorError | None = None
        for storage in present:
            try:
                return self._read(storage, codes, name, shape)
            except TensorError as error:
                problem = problem or error  # of what is meant first
        raise problem or self._unread(name)

    def _read(self, storage: Storage, codes: TensorInfo, name: str, shape: Shape) -> WeightSource:
        row, group = format_of(storage.format), group_of(storage, shape)
        if problem := cut_groups(row, group, shape):
            raise self.error(codes, problem)
        tensors = []
        for plane, suffix in zip(row.planes, storage.suffixes, strict=True):
            # Where the configuration means, else where others store scales.
            others = plane.suffixes if plane is not row.codes else ()
            tensor = self._beside(codes, name, suffix, *others)
            self._check_dtype(tensor, plane.dtypes)
            wanted = plane.stored_shape(shape, group, tensor.dtype)
            self._check_shape(tensor, wanted, _same(tensor.shape, wanted))
            tensors.append(tensor if tensor.shape == wanted else replace(tensor, shape=wanted))
        for suffix, dtypes, wanted in storage.beside:
            other = self._beside(codes, name, suffix)
            self._check_dtype(other, dtypes)
            self._check_shape(other, wanted)
        return coded(row, storage, name, shape, tensors)

    def _unread(self, name: str) -> TensorError:
        """Why no format of the configuration reads a weight that is not stored plainly."""
        if others := list(self._of_others(name)):
            fit = (each for each in others if each[1].dtype in each[0].codes.dtypes)
            row, codes = next(fit, others[0])
            if codes.dtype not in row.codes.dtypes:
                return self.error(codes, f"is {codes.dtype}, must be {_either(row.codes.dtypes)}")
            is_what = f"is {_what(codes, name)}, but"
            key = self.quantization.skip_key
            if key and self.quantization.skips(module_of(name)):
                return self.error(codes, f"{is_what} {key} in config.json lists it")
            return self.error(
                codes, f"{is_what} config.json has no {row.title} quantization_config"
            )
        data = self.tensors.get(name)
        if data is None:
            return TensorError(f"{self.where}: tensor {name} is missing")
        plain = (dtype for dtype, row in told_by_dtype().items() if not row.codes.block[1])
        read = [*plain, *(dtype for row in FORMATS.values() for dtype in row.codes.dtypes
                                  if row.scales and "" in row.codes.suffixes)]  # fmt: skip
        return self.error(data, f"is {data.dtype}; hmc reads {', '.join(dict.fromkeys(read))}")

    def _of_others(self, name: str) -> Iterator[tuple[Format, TensorInfo]]:
        """Codes of a weight that are there, with their format; those of the configuration's formats
        first.
        """
        own = [format_of(storage.format) for storage in self.quantization.storages]
        for row in dict.fromkeys([row.name for row in (*own, *FORMATS.values()) if row.scales]):
            found = format_of(row)
            for suffix in found.codes.suffixes:
                codes = self.tensors.get(named(name, suffix))
                if codes is not None and (suffix or codes.dtype in found.codes.dtypes):
                    yield found, codes

    def _beside(self, codes: TensorInfo, name: str, *suffixes: str) -> TensorInfo:
        for suffix in suffixes:
            if (tensor := self.tensors.get(named(name, suffix))) is not None:
                return tensor
        missing = named(name, suffixes[0])
        raise self.error(codes, f"is {_what(codes, name)}, but {missing} is missing")

    def _check_shape(self, tensor: TensorInfo, wanted: Shape, fits: bool = False) -> None:
        if not fits and tensor.shape != wanted:
            raise self.error(
                tensor, f"has shape {list(tensor.shape)}, config.json implies {list(wanted)}"
            )

    def _check_dtype(self, tensor: TensorInfo, wanted: Iterable[str]) -> None:
        if tensor.dtype not in wanted:
            raise self.error(tensor, f"is {tensor.dtype}, must be {_either(wanted)}")


def _same(stored: Shape, wanted: Shape) -> bool:
    """Whether a shape is the wanted one with other dimensions of 1, or with rows cut into groups
    (gpt-oss: [rows, columns / 32, 16]): the bytes lie the same way.
    """
    if stored == wanted:
        return True
    if len(stored) == 3 and stored[0] == wanted[0] and prod(stored[1:]) == prod(wanted[1:]):
        return True
    other = len(stored) != len(wanted) or prod(wanted) == 1
    return other and _without_ones(stored) == _without_ones(wanted)


def _without_ones(shape: Shape) -> list[int]:
    """The dimensions that say how elements lie: a vector is also a row, or a column of rows."""
    return [size for size in shape if size != 1]


def _what(codes: TensorInfo, name: str) -> str:
    return codes.dtype if codes.name == name else "packed"


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)
