"""The copy of a checkpoint: shard by shard as the original's, tensor by tensor, so that memory
holds one matrix. A shard is written beside its name and renamed when it is whole; what is there
already is not made again. Its report lies in the copy, and says what each tensor lost.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmc.checkpoint import LOSSY_KEY, Checkpoint, TensorInfo, WeightSource
from hmc.checkpoint.directory import INDEX_NAME
from hmc.checkpoint.headers import read_header
from hmc.checkpoint.jsonfile import read_object
from hmc.checkpoint.mapped import MappedShards
from hmc.errors import CheckpointError, TensorError, UsageError
from hmc.files import write_file
from hmc.formats import DTYPE_BITS, format_of, forms
from hmc.formats.arrange import all_arranged
from hmc.formats.decode import NUMPY, decode
from hmc.quantize.choice import Choice, choose
from hmc.quantize.encode import ENCODINGS, Encoding

REPORT_NAME = "hmc_quantize.json"
Progress = Callable[[str, int, int], None]
_COPY = 64 << 20


@dataclass(frozen=True)
class Report:
    """Of every encoded tensor its relative error |w - w'| / |w|; `kept` modules with the reason."""

    format: str
    group: int
    source: str
    errors: dict[str, float]
    kept: dict[str, str]

    @property
    def error(self) -> float:
        """Root of the mean square of the errors."""
        squares = [error**2 for error in self.errors.values()]
        return float((sum(squares) / len(squares)) ** 0.5) if squares else 0.0


def quantize(
    model: str | Path, output: str | Path, form: str, group: int = 0, experts_only: bool = False,
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Write a copy of the checkpoint `model` to the directory `output`, weights of matmuls in
    `form`, a key of `ENCODINGS`, with scales for `group` columns (0: the format's least).

    An `output` that a call with the same arguments left unfinished is finished. Raises `UsageError`
    for another one, a format or group that is not offered, `UnsupportedError` where what is to stay
    is quantised itself, `CheckpointError` where it cannot be written.
    """
    encoding, target = _encoding(form), Path(output)
    group = group or encoding.groups[0]
    if group not in encoding.groups:
        known = ", ".join(map(str, encoding.groups)) if any(encoding.groups) else "none"
        raise UsageError(f"--group {group}: {form} has groups of {known}")
    checkpoint = Checkpoint.open(model)
    if target.exists() and target.resolve() == checkpoint.directory.resolve():
        raise UsageError(f"{target}: is the model itself; give another directory")
    choice = choose(checkpoint, max(1, group), experts_only)
    if not choice.encoded:
        raise UsageError(f"{checkpoint.directory}: no weight of it can be stored as {form}")
    report = _begin(target, checkpoint, encoding, group, choice)
    writer = _Writer(checkpoint, target, encoding, group, choice, report, progress)
    with MappedShards(checkpoint.directory, checkpoint.shards) as mapped:
        writer.write(mapped)
    _finish(checkpoint, target, encoding, group, choice, report)
    return report


def _encoding(form: str) -> Encoding:
    if form not in ENCODINGS:
        raise UsageError(f"--format {form}: choose {', '.join(ENCODINGS)}")
    return ENCODINGS[form]


def _begin(
    target: Path, checkpoint: Checkpoint, encoding: Encoding, group: int, choice: Choice
) -> Report:
    """The report of an earlier call that did the same, or a new one in a new directory."""
    digest = hashlib.sha256()
    for shard in checkpoint.shards:
        digest.update(f"{shard.name} {shard.size} {shard.header_sha256}\n".encode())
    found = Report(encoding.format, group, digest.hexdigest(), {}, choice.kept)
    path = target / REPORT_NAME
    if path.exists():
        known = Report(**read_object(path, CheckpointError))
        same = (known.format, known.group, known.source, known.kept)
        if same != (found.format, found.group, found.source, found.kept):
            raise UsageError(f"{target}: holds a copy that was made otherwise; give another one")
        return known
    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise UsageError(f"{target}: is not empty, and no copy that hmc began")
    except OSError as problem:
        raise CheckpointError(f"{target}: cannot be made: {problem.strerror}") from problem
    _save(target, found)
    return found


def _save(target: Path, report: Report) -> None:
    text = json.dumps(vars(report), indent=1, sort_keys=True)
    write_file(target / REPORT_NAME, text, "the report", CheckpointError)


class _Writer:
    """Writes the shards."""

    def __init__(
        self, checkpoint: Checkpoint, target: Path, encoding: Encoding, group: int, choice: Choice,
        report: Report, progress: Progress | None,
    ) -> None:  # fmt: skip
        self._checkpoint, self._target, self._report = checkpoint, target, report
        self._encoding, self._group, self._choice = encoding, group, choice
        self._bases: list[int] = []
        self._progress, self._done = progress, 0
        self._total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())

    def write(self, mapped: MappedShards) -> None:
        """Every shard that is not there yet."""
        self._bases = mapped.addresses
        for number, shard in enumerate(self._checkpoint.shards):
            tensors = [each for each in self._checkpoint.tensors.values() if each.shard == number]
            path = self._target / shard.name
            if path.exists():
                self._step(sum(tensor.nbytes for tensor in tensors))
                continue
            try:
                self._shard(path, tensors)
            except OSError as problem:
                raise CheckpointError(f"{path}: cannot be written: {problem.strerror}") from problem
            _save(self._target, self._report)

    def _step(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress("encoding weights", self._done, self._total)

    def _made(self, tensor: TensorInfo) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor that comes of one."""
        if tensor.name in self._choice.dropped:
            return []
        source = self._choice.encoded.get(tensor.name)
        if source is None:
            return [(tensor.name, tensor.dtype, tensor.shape)]
        *stack, n, k = source.shape
        shapes = self._encoding.shapes((n, k), self._group)
        named = zip(self._encoding.suffixes, shapes, strict=True)
        found = [(source.name + end, dtype, (*stack, *shape)) for end, (dtype, shape) in named]
        if self._encoding.row.codes.bits and self._encoding.packing == "pack-quantized":
            found.append((f"{source.name}_shape", "I64", (*stack, 2)))
        return found

    def _shard(self, path: Path, tensors: list[TensorInfo]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in tensors:
            for name, dtype, shape in self._made(tensor):
                size = torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
                at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start, unfinished = 8 + len(text), path.with_name(f".{path.name}.unfinished")
        with open(unfinished, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                places = [start + header[name]["data_offsets"][0]
                          for name, _, _ in self._made(tensor)]  # fmt: skip
                if source := self._choice.encoded.get(tensor.name):
                    self._encode(file, source, places)
                elif places:
                    address = self._bases[tensor.shard] + tensor.offset
                    _copy(file, address, tensor.nbytes, places[0])
                self._step(tensor.nbytes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def _encode(self, file: Any, source: WeightSource, places: list[int]) -> None:
        """One matrix after the other, planes of a stack behind each other."""
        *_, n, k = source.shape
        lost = all_of_it = 0.0
        for matrix in self._matrices(source):
            planes = self._encoding.planes(matrix, self._group)
            sums = self._encoding.error(matrix, planes, self._group)
            lost, all_of_it = lost + sums[0], all_of_it + sums[1]
            if len(places) > len(planes):
                planes = (*planes, torch.tensor([n, k]))
            for number, plane in enumerate(planes):
                data = plane.contiguous().view(torch.uint8).numpy().tobytes()
                os.pwrite(file.fileno(), data, places[number])
                places[number] += len(data)
        self._report.errors[source.name] = (lost / all_of_it) ** 0.5 if all_of_it else 0.0

    def _matrices(self, source: WeightSource) -> Iterator[Tensor]:
        """Each [n, K] of a weight or stack as f32."""
        *stack, n, k = source.shape
        row, count = format_of(source.format), prod(stack)
        found = forms(row, (n, k), source.group, source.dtypes)
        for number in range(count):
            stored = []
            for form, tensor in zip(found, source.tensors, strict=True):
                size = tensor.nbytes // count
                place = self._bases[tensor.shard] + tensor.offset + number * size
                raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(place))
                kind = NUMPY[form.plane.means(form.dtype)]
                stored.append((form, raw.view(kind)))
            kept = [form.plane.layout.makes or form.plane.means(form.dtype) for form in found]
            try:
                planes = all_arranged(stored)
            except TensorError as error:
                raise TensorError(f"{source.name}: {error}") from error
            yield torch.from_numpy(decode(row, planes, kept, (n, k), source.group))


def _copy(file: Any, address: int, size: int, place: int) -> None:
    for first in range(0, size, _COPY):
        count = min(_COPY, size - first)
        raw = (ctypes.c_uint8 * count).from_address(address + first)
        os.pwrite(file.fileno(), raw, place + first)


def _finish(
    checkpoint: Checkpoint, target: Path, encoding: Encoding, group: int, choice: Choice,
    report: Report,
) -> None:  # fmt: skip
    """Index, config.json, and what else lies beside the weights."""
    names = {shard.name for shard in checkpoint.shards}
    for path in sorted(checkpoint.directory.iterdir()):
        known = path.name in names or path.name in (INDEX_NAME, "config.json", REPORT_NAME)
        if path.is_file() and not known and not path.name.endswith((".safetensors", ".bin")):
            shutil.copyfile(path, target / path.name)
    _write_index(checkpoint, target)
    values = {key: value for key, value in checkpoint.config.values.items()
              if key != "compression_config"}  # fmt: skip
    values[LOSSY_KEY] = (
        f"{encoding.row.about.format(scale='bf16', group=group)} by hmc quantize:"
        f" {len(report.errors)} tensors, relative error {report.error:.3f}"
    )
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": encoding.packing,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": encoding.config(group),
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": sorted({*choice.kept, "lm_head"}),
        "kv_cache_scheme": None,
    }
    text = json.dumps(values, indent=2)
    write_file(target / "config.json", text, "the configuration", CheckpointError)


def _write_index(checkpoint: Checkpoint, target: Path) -> None:
    if len(checkpoint.shards) == 1:
        return
    weight_map: dict[str, str] = {}
    total = 0
    for shard in checkpoint.shards:
        info, tensors = read_header(target / shard.name)
        total += info.size - info.header_bytes
        weight_map |= dict.fromkeys(tensors, shard.name)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    write_file(target / INDEX_NAME, text, "the index", CheckpointError)
