"""What the fuzzer of readers begins with: small files as tools write them, and how each is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
from checkpoint_files import entries, write_config, write_shard
from published import ATTENTION, EXPERT, HEAD, MATRIX, PUBLISHED, ROUTER, STORED

from hmc.checkpoint import Checkpoint, load_config
from hmc.checkpoint.directory import INDEX_NAME, SINGLE_NAME
from hmc.checkpoint.gguf import open_gguf, read_tokenizer
from hmc.errors import TensorError
from hmc.models import load, weight_specs

TINY = Path(__file__).parents[1] / "models" / "tiny"


@dataclass(frozen=True)
class Reader:
    """A reader of the file `name` in a directory where `prepare` put what it needs besides; `seeds`
    are contents to begin with. `megabytes` are what it may take whatever the file.
    """

    name: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    prepare: Callable[[Path], object] = lambda directory: None
    megabytes: int = 4


def _text(value: object) -> bytes:
    return json.dumps(value).encode()


def _shards() -> list[bytes]:
    found = []
    for ends in STORED.values():
        small = {f"m{end}": (dtype, (2, 3)) for end, (dtype, _) in ends.items()}
        table, size = entries(small)
        header = _text({"__metadata__": {"format": "pt"}, **table})
        found.append(len(header).to_bytes(8, "little") + header + bytes(size))
    return found


def _open(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    for tensor in checkpoint.tensors.values():
        shard = checkpoint.shards[tensor.shard]
        assert shard.header_bytes <= tensor.offset <= tensor.offset + tensor.nbytes <= shard.size


def _two_shards(directory: Path) -> None:
    write_config(directory)
    for shard, name in enumerate("ab"):
        write_shard(directory / f"model-{shard}.safetensors", {name: ("BF16", (2,))})


def _indices() -> list[bytes]:
    places = {"a": "model-0.safetensors", "b": "model-1.safetensors"}
    return [_text({"metadata": {"total_size": 8}, "weight_map": places})]


def _sections() -> list[bytes]:
    return [_text({"quantization_config": each.section}) for each in PUBLISHED.values()]


def _resolve(directory: Path) -> None:
    invented = Checkpoint.from_config(directory)
    for module in (ATTENTION, EXPERT, ROUTER, HEAD, "layers.3.ffn.experts.9.w1", ""):
        try:
            source = invented.resolve(f"{module}.weight", MATRIX, linear=True)
        except TensorError:
            continue
        assert source.tensors and source.nbytes > 0


def _configs() -> list[bytes]:
    return [path.read_bytes() for path in sorted(TINY.glob("*.json"))]


def _model(directory: Path) -> None:
    weight_specs(load(load_config(directory)).module)


def _gguf_files() -> list[bytes]:
    return [_gguf(name) for name in ("qwen3moe", "deepseek2", "llama", "gpt-oss")]


def _gguf(architecture: str) -> bytes:
    """A model of one layer, with a vocabulary."""
    with TemporaryDirectory() as folder:
        return _written(Path(folder) / "model.gguf", architecture).read_bytes()


def _written(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {"block_count": 1, "embedding_length": 32, "context_length": 64, "expert_count": 2,
             "attention.head_count": 2, "attention.head_count_kv": 1, "expert_used_count": 1,
             "expert_feed_forward_length": 32, "feed_forward_length": 32,
             "attention.kv_lora_rank": 6, "attention.key_length": 16, "rope.dimension_count": 16,
             "attention.value_length": 16, "leading_dense_block_count": 0}  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "qwen2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "<end>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 1, 3])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 3)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    for name, shape in (("token_embd", (4, 32)), ("blk.0.ffn_up_exps", (2, 3, 32))):
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    codes = gguf.quantize(np.zeros((2, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.attn_q.weight", codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _open_gguf(directory: Path) -> None:
    path = directory / "model.gguf"
    found = open_gguf(path)
    for tensor in found.tensors.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= found.shards[0].size
    read_tokenizer(path)


READERS: dict[str, Reader] = {
    "safetensors": Reader(SINGLE_NAME, _open, _shards, write_config),
    "index": Reader(INDEX_NAME, _open, _indices, _two_shards),
    "quantization": Reader("config.json", _resolve, _sections),
    "config": Reader("config.json", _model, _configs, megabytes=64),
    "gguf": Reader("model.gguf", _open_gguf, _gguf_files, megabytes=8),
}
