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

from hmc.checkpoint.config import CONFIG_NAME, ModelConfig, load_config
from hmc.checkpoint.directory import local_directory, read_shards
from hmc.checkpoint.headers import ShardInfo, TensorInfo
from hmc.checkpoint.jsonfile import first_few, quote
from hmc.checkpoint.quantization import Quantization, read_quantization
from hmc.checkpoint.views import Stack, View, rows_of
from hmc.errors import TensorError, UnsupportedError
from hmc.formats import DTYPE_BITS, FORMATS, Format, Storage, format_of, matrix_of

Shape = tuple[int, ...]

_TORCH_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A parameter found: the `tensors` of its planes, in the order of its format's row.

    `group` is the number of columns that share a scale, where the format leaves that open, else 0;
    `beside` names tensors that belong to it and hold nothing that is needed; `note` is the reason
    for the format, in a few words for a plan.
    """

    name: str
    shape: Shape
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
        return InventedCheckpoint(path.parent, config, quantization, dtype=_config_dtype(config))

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
        if view is not None and view.stacked and view.shape[0] != count:
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
        missing = [name for name in names if not any(name + end in self.tensors for end in ends)]
        if missing:
            what = "tensor is" if len(missing) == 1 else "tensors are"
            raise TensorError(
                f"{self.directory}: {len(missing)} {what} missing: {first_few(missing)}"
            )

    def check_unused(self, used: Iterable[str], tolerated: Iterable[str] = ()) -> None:
        """Raise `TensorError` if a tensor is neither in `used` nor fits a pattern of `tolerated`.

        `used` are names of tensors (`WeightSource.tensor_names`); patterns are those of a shell
        ("model.layers.61.*"). A tensor nobody reads means that the model is not what it seems.
        """
        extra = sorted(self.tensors.keys() - set(used))
        patterns = [fnmatch.translate(pattern) for pattern in tolerated]
        if patterns:
            known = re.compile("|".join(patterns)).match
            extra = [name for name in extra if known(name) is None]
        if extra:
            what = "tensor belongs" if len(extra) == 1 else "tensors belong"
            raise TensorError(
                f"{self.directory}: {len(extra)} {what} to no part of the model: {first_few(extra)}"
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
            if view.stacked:
                whole = replace(self, tensors=Stack(self.tensors, expert, view.shape[0]))
            found = whole.resolve(name, view.shape[-2:], linear=linear)
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
            wanted = storage.format if (storage := self.quantization.storage) else ""
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

    def _plain(self, data: TensorInfo, shape: Shape, linear: bool) -> WeightSource:
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
        self, row: Format, codes: TensorInfo, name: str, shape: Shape, linear: bool
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

    def _check_shape(self, tensor: TensorInfo, wanted: Shape) -> None:
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
        name = view.of(name, shape[0]) if view else name
        quantization, storage = self.quantization, self.quantization.storage
        if not linear or storage is None or quantization.skips(_module(name)):
            row = next(each for each in FORMATS.values() if self.dtype in each.codes.dtypes)
            note = _plain_note(self.dtype, linear, quantization, name)
            alone = (_invented(name, self.dtype, shape),)
            return WeightSource(name, shape, row.name, 0, alone, (), note)
        row = format_of(storage.format)
        if problem := _cut_groups(row, storage, shape):
            raise TensorError(f"tensor {name} {problem}")
        tensors = [
            _invented(name + suffix, dtype, plane.stored_shape(shape, storage.group, dtype))
            for plane, suffix in zip(row.planes, storage.suffixes, strict=True)
            for dtype in plane.dtypes[:1]
        ]
        return _source(row, storage, name, shape, tensors)


def _source(
    row: Format, storage: Storage, name: str, shape: Shape, tensors: list[TensorInfo]
) -> WeightSource:
    note = row.note(storage.group, [tensor.dtype for tensor in tensors])
    beside = tuple(name + suffix for suffix, _, _ in storage.beside)
    return WeightSource(name, shape, row.name, storage.group, tuple(tensors), beside, note)


def _cut_groups(row: Format, storage: Storage, shape: Shape) -> str:
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
