"""A model directory as one object, and where the planes of each parameter lie, in which format; and
why.

`Checkpoint` finds them among the tensors of its shards and refuses whatever does not fit together.
`InventedCheckpoint` answers for a config.json alone, in the format that configuration implies, so
that a model can be planned and timed before its weights are downloaded. Which tensors a format has,
of which names, dtypes and shapes, stands in its row (hmc/formats).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType

from hmc.checkpoint.config import CONFIG_NAME, ModelConfig, load_config
from hmc.checkpoint.directory import local_directory, read_shards
from hmc.checkpoint.finding import Finder
from hmc.checkpoint.headers import ShardInfo, TensorInfo
from hmc.checkpoint.jsonfile import first_few, quote
from hmc.checkpoint.quantization import Note, Quantization, read_quantization
from hmc.checkpoint.source import (
    Shape,
    WeightSource,
    coded,
    cut_groups,
    group_of,
    module_of,
    plain_note,
)
from hmc.checkpoint.views import Stack, View, picked, rows_of
from hmc.errors import TensorError, UnsupportedError
from hmc.formats import DTYPE_BITS, FORMATS, format_of, named

_TORCH_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SCALE = re.compile(r"(?:scale|scales|scale_inv|scale_\d|zero_point|zeros|shape|g_idx)$")
"""Ends of names of what only quantised weights have."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model directory.

    `shards` are sorted by name, and `TensorInfo.shard` indexes them; `tensors` are all of theirs.
    """

    directory: Path
    config: ModelConfig
    quantization: Quantization
    shards: tuple[ShardInfo, ...] = ()
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path | str) -> Checkpoint:
        """Open a local model directory.

        Raises `UsageError` for an argument that is no directory, `ConfigError`, `ShardError` and
        `TensorError` for what is wrong inside, `UnsupportedError` for a format without kernels.
        """
        path = local_directory(str(directory))
        config = load_config(path)
        return Checkpoint(path, config, read_quantization(config), *read_shards(path))

    @staticmethod
    def from_config(path: Path | str) -> InventedCheckpoint:
        """A checkpoint of invented weights, from a config.json or a directory that holds one.

        Weights outside `quantization_config` take the config's `dtype` (BF16 if it names none).
        """
        path = Path(path)
        if not path.is_file():
            path = local_directory(str(path)) / CONFIG_NAME
        config = load_config(path)
        quantization = read_quantization(config)
        return InventedCheckpoint(
            path.parent, config, quantization, dtype=_config_dtype(config.text)
        )

    @property
    def location(self) -> Path:
        """What to open to have it again."""
        return self.directory

    @property
    def dummy(self) -> bool:
        """Whether there are no shards, and weights are invented."""
        return not self.shards

    def resolve_experts(
        self,
        pattern: str,
        count: int,
        shape: Shape,
        view: View | None = None,
        *,
        linear: bool = True,
    ) -> list[WeightSource]:
        """One weight of each of `count` experts, as `resolve`; `{e}` in `pattern` is the expert,
        unless the `view` is one of a stack.
        """
        if view is not None and view.stacked(shape) and view.shape[0] != count:
            raise TensorError(f"{pattern}: {view.shape[0]} experts are stacked, not {count}")
        names = [pattern.replace("{e}", str(e)) for e in range(count)]
        return self._each(names, shape, view, linear=linear)

    def _each(
        self, names: list[str], shape: Shape, view: View | None, *, linear: bool
    ) -> list[WeightSource]:
        self.require_present(names)
        return [
            self.resolve(name, shape, linear=linear, view=view, expert=expert)
            for expert, name in enumerate(names)
        ]

    def require_present(self, names: Iterable[str]) -> None:
        """Raise one `TensorError` that counts those of `names` no tensor stands for."""
        ends = {suffix for row in FORMATS.values() for suffix in row.codes.suffixes}
        missing = [
            name for name in names if not any(named(name, end) in self.tensors for end in ends)
        ]
        if missing:
            what = "tensor is" if len(missing) == 1 else "tensors are"
            raise TensorError(
                f"{self.directory}: {len(missing)} {what} missing: {first_few(missing)}"
            )

    def check_unused(
        self, used: Iterable[str], tolerated: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[Note, ...]:
        """What is left aside, how much of it, and why: tensors that fit a pattern of `tolerated`,
        and those that the quantisation explains; `TensorError` for any other not in `used`.

        `used` are names of tensors (`WeightSource.tensor_names`); patterns, with the reason of
        each, are those of a shell ("model.layers.61.*"). A tensor nobody reads means that the model
        is not what it seems.
        """
        rules = [(re.compile(fnmatch.translate(pattern)).match, pattern, why)
                 for pattern, why in tolerated.items()]  # fmt: skip
        rules += [(re.compile(regex).fullmatch, "", why) for regex, why in self.quantization.beside]
        aside: dict[tuple[str, str], list[str]] = {}
        extra: list[str] = []
        scales: list[str] = []
        known = set(used)
        modules = {name.rpartition(".")[0] for name in known}
        for name in sorted(self.tensors.keys() - known):
            of = next(((pattern, why) for fits, pattern, why in rules if fits(name)), None)
            if of is not None:
                aside.setdefault(of, []).append(name)
            else:
                beside = _SCALE.search(name) and name.rpartition(".")[0] in modules
                (scales if beside else extra).append(name)
        for found, what in ((scales, "beside a weight, of a meaning that no format knows"),
                            (extra, "to no part of the model")):  # fmt: skip
            if found:
                verb = "tensor belongs" if len(found) == 1 else "tensors belong"
                text = f"{len(found)} {verb} {what}: {first_few(found)}"
                raise TensorError(f"{self.directory}: {text}")
        return tuple(
            Note(pattern or first_few(names, 1), f"{len(names)} left aside", why)
            for (pattern, why), names in aside.items()
        )

    def resolve(
        self, name: str, shape: Shape, *, linear: bool, view: View | None = None, expert: int = 0
    ) -> WeightSource:
        """Where the parameter `name` of logical `shape` lies, and in which format.

        `linear` says that it is the weight [out, in] of a linear layer which quantisation may
        touch: norms, embeddings, biases and routers are not. Raises `TensorError` if it is missing,
        mis-shaped or mis-typed, or if its format, its scales and the config contradict each other.
        With a `view` it is a part of the tensor of that name, of a stack that of `expert`.
        """
        if view is not None:
            whole = self
            if view.stacked(shape):
                whole = replace(self, tensors=Stack(self.tensors, expert, view.shape[0]))
            found = whole.resolve(name, view.shape[-len(shape) :], linear=linear)
            found = replace(found, name=view.of(name, shape[0]), shape=shape)
            if view.step > 1 or view.transposed:
                own, picks = picked(found.tensors, found.format, found.group, view, shape)
                return replace(found, tensors=own, picks=picks)
            own = rows_of(found.tensors, found.format, found.group, view.first, shape)
            return replace(found, tensors=own)
        where = str(self.directory)
        return Finder(self.tensors, self.quantization, where, self._error).find(name, shape, linear)

    def _error(self, tensor: TensorInfo, problem: str) -> TensorError:
        path = self.directory / self.shards[tensor.shard].name
        return TensorError(f"{path}: tensor {first_few([tensor.name])} {problem}")


@dataclass(frozen=True, slots=True)
class InventedCheckpoint(Checkpoint):
    """Every weight asked for, in the format `quantization` implies or else in `dtype`.

    The tensors lie in shard -1 at offset 0: sizes are real, places are not.
    """

    dtype: str = "BF16"

    def _each(
        self, names: list[str], shape: Shape, view: View | None, *, linear: bool
    ) -> list[WeightSource]:
        """Thousands of experts are alike but for their names: the first stands for all."""
        return [self.resolve(names[0], shape, linear=linear, view=view)] * len(names)

    def resolve(
        self, name: str, shape: Shape, *, linear: bool, view: View | None = None, expert: int = 0
    ) -> WeightSource:
        """A weight of the shape asked for."""
        full = view.of(name, shape[0]) if view else name
        storage = self.quantization.storage_of(module_of(name)) if linear else None
        if storage is None:
            row = next(each for each in FORMATS.values() if self.dtype in each.codes.dtypes)
            note = plain_note(self.dtype, linear, self.quantization, name)
            alone = (_invented(full, self.dtype, shape),)
            return WeightSource(full, shape, row.name, 0, alone, (), note)
        row, group = format_of(storage.format), group_of(storage, shape)
        if problem := cut_groups(row, group, shape):
            raise TensorError(f"tensor {full} {problem}")
        tensors = [
            _invented(named(full, suffix), dtype, plane.stored_shape(shape, group, dtype))
            for plane, suffix in zip(row.planes, storage.suffixes, strict=True)
            for dtype in plane.dtypes[:1]
        ]
        return coded(row, storage, full, shape, tensors)


def _invented(name: str, dtype: str, shape: Shape) -> TensorInfo:
    return TensorInfo(name, -1, dtype, shape, 0, prod(shape) * DTYPE_BITS[dtype] // 8)


def _config_dtype(config: ModelConfig) -> str:
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = config.get_str(key, "bfloat16").removeprefix("torch.")
    if name not in _TORCH_DTYPES:
        raise UnsupportedError(
            f"{config.path}: {key} is {quote(name)}; hmc reads {', '.join(_TORCH_DTYPES)}"
        )
    return _TORCH_DTYPES[name]
