"""A GGUF file as a checkpoint: what `Checkpoint` is of a directory, of metadata and tensors."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.gguf.families import Facts, Values
from hmc.checkpoint.gguf.files import read_files
from hmc.checkpoint.gguf.header import GgufFile
from hmc.checkpoint.gguf.names import published
from hmc.checkpoint.gguf.table import GGUF_FAMILIES
from hmc.checkpoint.gguf.vocabulary import end_ids
from hmc.checkpoint.headers import TensorInfo
from hmc.checkpoint.jsonfile import first_few, quote
from hmc.checkpoint.quantization import Quantization
from hmc.checkpoint.source import Part, Shape, WeightSource
from hmc.checkpoint.views import View
from hmc.checkpoint.weights import Checkpoint
from hmc.errors import ConfigError, TensorError, UnsupportedError
from hmc.formats import WIDE, told_by_dtype
from hmc.formats.ggml import GGML_TYPES

_LARGEST_SETTING = 1 << 16


@dataclass(frozen=True, slots=True)
class GgufCheckpoint(Checkpoint):
    """The model of a file, or of one that is split; `directory` holds it. `parts` are those of
    tensors that lie in several.
    """

    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)

    def resolve(
        self, name: str, shape: Shape, *, linear: bool, view: View | None = None, expert: int = 0
    ) -> WeightSource:
        """As of a directory; a weight with parts is put together when weights are opened."""
        found = Checkpoint.resolve(self, name, shape, linear=linear, view=view, expert=expert)
        parts = self.parts.get(name)
        if parts is None:
            return found
        kinds = ", ".join(part.tensor.dtype for part in parts)
        note = f"{found.tensors[0].dtype}, put together when weights are opened, of {kinds}"
        names = tuple(part.tensor.name for part in parts)
        return replace(found, beside=names, note=note, parts=parts)

    @property
    def location(self) -> Path:
        """The first file."""
        return self.config.path


def open_gguf(path: Path) -> GgufCheckpoint:
    """Open a GGUF file, or the first part of a split one.

    Raises `ShardError` and `TensorError` for files that are damaged, `ConfigError` for metadata of
    a wrong kind, `UnsupportedError` for an architecture that no row stands for.
    """
    files = read_files(path)
    head = files[0]
    architecture = head.settings.require_str("general.architecture")
    family = GGUF_FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedError(
            f"{path}: general.architecture is {quote(architecture)}; of GGUF files hmc reads"
            f" {', '.join(sorted(GGUF_FAMILIES))}"
        )
    raw = [tensor for file in files for tensor in file.tensors]
    _check_types(path, raw)
    shapes = {tensor.name: tensor.shape for tensor in raw}
    facts = Facts(head.settings, architecture, shapes, partial(_floats, files, raw))
    values = {**family.config(facts), **_vocabulary(head, raw)}
    weights = [tensor for tensor in raw if tensor.name not in family.settings]
    found = published(family, weights, facts.whole("expert_count", 0), str(path))
    return GgufCheckpoint(
        path.parent,
        ModelConfig(path, values, head.shard.header_sha256),
        Quantization(),
        tuple(file.shard for file in files),
        found.tensors,
        found.parts,
    )


def settings_of(file: GgufFile) -> tuple[TensorInfo, ...]:
    """The tensors of a file whose data `open_gguf` reads besides headers."""
    family = GGUF_FAMILIES.get(file.settings.get_str("general.architecture", ""))
    names = family.settings if family else ()
    return tuple(t for t in file.tensors if t.name in names and t.nbytes <= _LARGEST_SETTING)


def _floats(files: Sequence[GgufFile], tensors: Sequence[TensorInfo], name: str) -> list[float]:
    """The numbers of a vector of F32 and at most 64 KiB."""
    tensor = next((each for each in tensors if each.name == name), None)
    where = f"{files[0].path}: tensor {quote(name)}"
    if tensor is None:
        raise TensorError(f"{where} is missing")
    if len(tensor.shape) != 1 or tensor.dtype != WIDE or tensor.nbytes > _LARGEST_SETTING:
        raise TensorError(f"{where} is {tensor.dtype} {list(tensor.shape)}, no short vector of F32")
    with files[tensor.shard].path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise TensorError(f"{where}: the file ends in it")
    return [number for (number,) in struct.iter_unpack("<f", data)]


def _check_types(path: Path, tensors: list[TensorInfo]) -> None:
    """Every tensor is of a type that some format is told by."""
    known = told_by_dtype()
    others = sorted({each.dtype for each in tensors if each.dtype not in known})
    if others:
        names = [each.name for each in tensors if each.dtype in others]
        read = [each.name for each in GGML_TYPES.values() if each.dtype in known]
        raise UnsupportedError(
            f"{path}: {len(names)} tensors of type {', '.join(others)} ({first_few(names, 1)}); of"
            f" GGUF's types hmc reads {', '.join(read)}"
        )


def _vocabulary(head: GgufFile, tensors: list[TensorInfo]) -> Values:
    """Rows of the embedding table, and what ends an answer."""
    table = next((each for each in tensors if each.name == "token_embd.weight"), None)
    if table is None or len(table.shape) != 2:
        raise ConfigError(f"{head.path}: no token_embd.weight of two dimensions in it")
    return {"vocab_size": table.shape[0], "eos_token_id": list(end_ids(head.settings))}
