"""Where the weight of one parameter lies, in which format, with which scales; and why.

`StoredWeights` finds it among the tensors of a checkpoint and refuses whatever does not fit
together. `InventedWeights` answers for a config.json alone, in the format that configuration
implies, so that a model can be planned and timed before its weights are downloaded.

Names: a weight is asked for as `<module>.weight`. FP8 keeps that name, beside `weight_scale_inv`
(or `weight_scale`); packed INT4 has `weight_packed`, `weight_scale` and `weight_shape` instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, Protocol

from hmc.checkpoint.headers import DTYPE_BITS, Shard, TensorInfo
from hmc.checkpoint.jsonfile import first_few
from hmc.checkpoint.quantization import Quantization
from hmc.errors import TensorError

WeightFormat = Literal["fp8", "bf16", "fp16", "f32", "int4"]

PLAIN_FORMATS: Mapping[str, WeightFormat] = {"BF16": "bf16", "F16": "fp16", "F32": "f32"}
"""Formats that need no scales, by dtype."""

INVENTED = -1
"""`TensorInfo.shard` of a tensor that no file holds."""

_FP8 = "F8_E4M3"
_FP8_SCALES = ("F32", "BF16")
_INT4_SCALES = ("F32", "BF16", "F16")
_NIBBLES = 8  # INT4 values in one I32


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A parameter found: `data` as stored, and `scale` for fp8 and int4.

    fp8: data F8_E4M3 [N, K], scale F32 or BF16 [ceil(N/128), ceil(K/128)], the weight is their
    product. int4: data I32 [N, K/8], eight values a word, lowest nibble first, each stored plus 8;
    scale F32, BF16 or F16 [N, K/block]. Others: data alone. `block` is the scale block or group
    size, 0 without scales; `note` is the reason for the format, in a few words for a plan.
    """

    name: str
    shape: tuple[int, ...]
    format: WeightFormat
    data: TensorInfo
    scale: TensorInfo | None
    scale_dtype: str
    block: int
    note: str

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that this weight accounts for."""
        if self.scale is None:
            return (self.data.name,)
        if self.format == "int4":
            return (self.data.name, self.scale.name, f"{self.name}_shape")
        return (self.data.name, self.scale.name)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)


class Weights(Protocol):
    """Answers where a parameter is; `TensorError` if it is not, or not as asked for."""

    def find(self, name: str, shape: tuple[int, ...], linear: bool) -> WeightSource: ...

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
        stored = self.tensors
        return [name for name in names if name not in stored and f"{name}_packed" not in stored]

    def find(self, name: str, shape: tuple[int, ...], linear: bool) -> WeightSource:
        """The tensors of one parameter, checked against `shape`, each other and the config."""
        data = self.tensors.get(name)
        packed = self.tensors.get(f"{name}_packed")
        if packed is not None:
            if data is not None:
                raise self._error(packed, f"stands beside {name}: only one of them can count")
            return self._find_int4(name, shape, linear, packed)
        if data is None:
            raise TensorError(f"{self.directory}: tensor {name} is missing")
        self._check_shape(data, shape)
        if data.dtype == _FP8:
            return self._find_fp8(shape, linear, data)
        return self._find_plain(shape, linear, data)

    def _find_plain(self, shape: tuple[int, ...], linear: bool, data: TensorInfo) -> WeightSource:
        weight_format = PLAIN_FORMATS.get(data.dtype)
        if weight_format is None:
            known = ", ".join((*PLAIN_FORMATS, _FP8))
            raise self._error(data, f"is {data.dtype}; hmc reads {known}")
        for suffix in ("_scale_inv", "_scale"):
            scale = self.tensors.get(data.name + suffix)
            if scale is not None:
                raise self._error(data, f"is {data.dtype}, yet {scale.name} holds scales for it")
        note = _plain_note(data.dtype, linear, self.quantization, data.name)
        return WeightSource(data.name, shape, weight_format, data, None, "", 0, note)

    def _find_fp8(self, shape: tuple[int, ...], linear: bool, data: TensorInfo) -> WeightSource:
        quantization, name = self.quantization, data.name
        if not linear:
            raise self._error(data, f"is {_FP8}, but hmc reads only linear weights in FP8")
        if quantization.kind != "fp8":
            raise self._error(data, f"is {_FP8}, but config.json has no FP8 quantization_config")
        if quantization.skip_key and quantization.skips(_module(name)):
            raise self._error(
                data, f"is {_FP8}, but {quantization.skip_key} in config.json lists it"
            )
        scale = self.tensors.get(name + quantization.scale_suffix)
        if scale is None:
            raise self._error(data, f"is {_FP8}, but {name}{quantization.scale_suffix} is missing")
        block = quantization.block
        self._check_dtype(scale, _FP8_SCALES)
        self._check_shape(scale, _blocks(shape, block))
        note = _FP8_NOTES[scale.dtype]
        return WeightSource(name, shape, "fp8", data, scale, scale.dtype, block, note)

    def _find_int4(
        self, name: str, shape: tuple[int, ...], linear: bool, packed: TensorInfo
    ) -> WeightSource:
        quantization = self.quantization
        if not linear:
            raise self._error(packed, "is packed INT4, but hmc reads only linear weights in INT4")
        if quantization.kind != "int4":
            raise self._error(packed, "is packed, but config.json has no INT4 quantization_config")
        if quantization.skips(_module(name)):
            raise self._error(
                packed, f"is packed, but {quantization.skip_key} in config.json lists it"
            )
        rows, columns = _matrix(name, shape)
        if columns % quantization.block:
            raise self._error(
                packed,
                f"has {columns} input columns, no multiple of group_size {quantization.block}",
            )
        self._check_dtype(packed, ("I32",))
        self._check_shape(packed, (rows, columns // _NIBBLES))
        scale = self._beside(packed, f"{name}_scale")
        self._check_dtype(scale, _INT4_SCALES)
        self._check_shape(scale, (rows, columns // quantization.block))
        stored_shape = self._beside(packed, f"{name}_shape")
        self._check_dtype(stored_shape, ("I64", "I32"))
        self._check_shape(stored_shape, (2,))
        note = _int4_note(quantization.block, scale.dtype)
        return WeightSource(
            name, shape, "int4", packed, scale, scale.dtype, quantization.block, note
        )

    def _beside(self, packed: TensorInfo, name: str) -> TensorInfo:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise self._error(packed, f"is there, but {name} is missing")
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

    The tensors lie in shard `INVENTED` at offset 0: sizes are real, places are not. Scales are F32
    for fp8, as in DeepSeek-V3, and BF16 for int4, as compressed-tensors writes them.
    """

    dtype: str
    quantization: Quantization

    def missing(self, names: Iterable[str]) -> list[str]:
        """Nothing is: what is asked for is invented."""
        return []

    def find(self, name: str, shape: tuple[int, ...], linear: bool) -> WeightSource:
        """A weight of the shape asked for."""
        quantization = self.quantization
        block = quantization.block
        if not linear or quantization.kind == "none" or quantization.skips(_module(name)):
            data = _invented(name, self.dtype, shape)
            note = _plain_note(self.dtype, linear, quantization, name)
            return WeightSource(name, shape, PLAIN_FORMATS[self.dtype], data, None, "", 0, note)
        scale_name = name + quantization.scale_suffix
        if quantization.kind == "fp8":
            data = _invented(name, _FP8, shape)
            scale = _invented(scale_name, "F32", _blocks(shape, block))
            return WeightSource(name, shape, "fp8", data, scale, "F32", block, _FP8_NOTES["F32"])
        rows, columns = _matrix(name, shape)
        if columns % block:
            raise TensorError(
                f"tensor {name} has {columns} input columns, no multiple of group_size {block}"
            )
        data = _invented(f"{name}_packed", "I32", (rows, columns // _NIBBLES))
        scale = _invented(scale_name, "BF16", (rows, columns // block))
        note = _int4_note(block, "BF16")
        return WeightSource(name, shape, "int4", data, scale, "BF16", block, note)


_FP8_NOTES = {dtype: f"FP8 E4M3, 128x128 scales in {dtype}" for dtype in _FP8_SCALES}


def _int4_note(group_size: int, scale_dtype: str) -> str:
    return f"INT4 symmetric, one {scale_dtype} scale per {group_size} columns"


def _plain_note(dtype: str, linear: bool, quantization: Quantization, name: str) -> str:
    if quantization.kind == "none":
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


def _blocks(shape: tuple[int, ...], block: int) -> tuple[int, int]:
    """Scale blocks that cover a matrix; those at its edges may be ragged."""
    rows, columns = _matrix("", shape)
    return -(-rows // block), -(-columns // block)


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"a linear weight has two dimensions, {name} was asked for as {shape}")
    return shape[0], shape[1]


def _invented(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, INVENTED, dtype, shape, 0, prod(shape) * DTYPE_BITS[dtype] // 8)
