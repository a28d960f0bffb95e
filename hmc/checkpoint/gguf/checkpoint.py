"""A GGUF file as a checkpoint: what `Checkpoint` is of a directory, of metadata and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.gguf.deepseek2 import DEEPSEEK2
from hmc.checkpoint.gguf.families import Facts, GgufFamily, Values
from hmc.checkpoint.gguf.files import read_files
from hmc.checkpoint.gguf.header import GgufFile
from hmc.checkpoint.gguf.llama import LLAMA
from hmc.checkpoint.gguf.names import published
from hmc.checkpoint.gguf.qwen3moe import QWEN3_MOE
from hmc.checkpoint.gguf.vocabulary import end_ids
from hmc.checkpoint.headers import TensorInfo
from hmc.checkpoint.jsonfile import quote
from hmc.checkpoint.quantization import Quantization
from hmc.checkpoint.weights import Checkpoint
from hmc.errors import ConfigError, UnsupportedError

GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "deepseek2": DEEPSEEK2,
    "llama": LLAMA,
    "qwen3moe": QWEN3_MOE,
}
"""Rows by `general.architecture`."""


@dataclass(frozen=True, slots=True)
class GgufCheckpoint(Checkpoint):
    """The model of the files that `file` is, or begins; `directory` holds them."""

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
    facts = Facts(head.settings, architecture, frozenset(tensor.name for tensor in raw))
    values = {**family.config(facts), **_vocabulary(head, raw)}
    return GgufCheckpoint(
        path.parent,
        ModelConfig(path, values, head.shard.header_sha256),
        Quantization(),
        tuple(file.shard for file in files),
        published(family, raw, facts.whole("expert_count", 0), str(path)),
    )


def _vocabulary(head: GgufFile, tensors: list[TensorInfo]) -> Values:
    """Rows of the embedding table, and what ends an answer."""
    table = next((each for each in tensors if each.name == "token_embd.weight"), None)
    if table is None or len(table.shape) != 2:
        raise ConfigError(f"{head.path}: no token_embd.weight of two dimensions in it")
    return {"vocab_size": table.shape[0], "eos_token_id": list(end_ids(head.settings))}
