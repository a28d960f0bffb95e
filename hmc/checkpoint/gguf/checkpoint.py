"""A GGUF file as a checkpoint: what `Checkpoint` is of a directory, of metadata and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.gguf.deepseek2 import DEEPSEEK2
from hmc.checkpoint.gguf.families import Facts, GgufFamily, Values
from hmc.checkpoint.gguf.files import read_files
from hmc.checkpoint.gguf.gptoss import GPT_OSS
from hmc.checkpoint.gguf.header import GgufFile
from hmc.checkpoint.gguf.llama import LLAMA
from hmc.checkpoint.gguf.names import published
from hmc.checkpoint.gguf.qwen3moe import QWEN3_MOE
from hmc.checkpoint.gguf.vocabulary import end_ids
from hmc.checkpoint.headers import TensorInfo
from hmc.checkpoint.jsonfile import first_few, quote
from hmc.checkpoint.quantization import Quantization
from hmc.checkpoint.source import Part, Shape, WeightSource
from hmc.checkpoint.views import View
from hmc.checkpoint.weights import Checkpoint
from hmc.errors import ConfigError, UnsupportedError
from hmc.formats import told_by_dtype
from hmc.formats.ggml import GGML_TYPES

GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "deepseek2": DEEPSEEK2,
    "gpt-oss": GPT_OSS,
    "llama": LLAMA,
    "qwen3moe": QWEN3_MOE,
}
"""Rows by `general.architecture`."""


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
    facts = Facts(head.settings, architecture, frozenset(tensor.name for tensor in raw))
    values = {**family.config(facts), **_vocabulary(head, raw)}
    found = published(family, raw, facts.whole("expert_count", 0), str(path))
    return GgufCheckpoint(
        path.parent,
        ModelConfig(path, values, head.shard.header_sha256),
        Quantization(),
        tuple(file.shard for file in files),
        found.tensors,
        found.parts,
    )


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
