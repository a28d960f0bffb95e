"""Write a DeepSeek-V3 checkpoint of the real shapes without its weights: real headers, sparse data.

    python tests/make_deepseek_v3.py DIRECTORY

671B parameters, 90,427 tensors, 135 shards: 671 GB by their lengths, 21 MB on disk, all weights
zero. Needs a file system with sparse files. The count is that of the main model:

    61 layers x 14   norms (2 of the layer, 2 of the latents), five FP8 projections with scales
     3 layers x  6   dense MLP, three FP8 projections with scales
    58 layers x 1544 router and its bias (2), 256 experts and 1 shared one of six tensors each
                 3   embedding, last norm, head

The multi-token-prediction layer 61, with which the hub's copy comes to 91,991 tensors in 163
shards, is left out, as checkpoints that transformers writes leave it out. Within a shard, tensors
lie as safetensors writes them: wide dtypes first, then by name.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

CONFIG = Path(__file__).parent.parent / "examples" / "configs" / "deepseek-v3" / "config.json"
TENSORS = 90_427
SHARDS = 135
SHARD_BYTES = 5_000_000_000
"""Largest shard, as save_pretrained(max_shard_size="5GB") cuts them."""

ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


class Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def fp8(module: str, rows: int, columns: int) -> Iterator[Tensor]:
    """A linear weight and its scales, one per 128x128 block, ragged at the edges."""
    yield Tensor(f"{module}.weight", "F8_E4M3", (rows, columns))
    yield Tensor(f"{module}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128)))


def mlp(module: str, hidden: int, intermediate: int) -> Iterator[Tensor]:
    yield from fp8(f"{module}.gate_proj", intermediate, hidden)
    yield from fp8(f"{module}.up_proj", intermediate, hidden)
    yield from fp8(f"{module}.down_proj", hidden, intermediate)


def attention(module: str, c: dict[str, int]) -> Iterator[Tensor]:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    yield from fp8(f"{module}.q_a_proj", c["q_lora_rank"], hidden)
    yield Tensor(f"{module}.q_a_layernorm.weight", "BF16", (c["q_lora_rank"],))
    yield from fp8(f"{module}.q_b_proj", heads * (nope + rope), c["q_lora_rank"])
    yield from fp8(f"{module}.kv_a_proj_with_mqa", c["kv_lora_rank"] + rope, hidden)
    yield Tensor(f"{module}.kv_a_layernorm.weight", "BF16", (c["kv_lora_rank"],))
    yield from fp8(f"{module}.kv_b_proj", heads * (nope + value), c["kv_lora_rank"])
    yield from fp8(f"{module}.o_proj", hidden, heads * value)


def model(c: dict[str, int]) -> Iterator[Tensor]:
    """All tensors in the order of the layers."""
    hidden, experts, width = c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"]
    yield Tensor("model.embed_tokens.weight", "BF16", (c["vocab_size"], hidden))
    for number in range(c["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from attention(f"{layer}.self_attn", c)
        if number < c["first_k_dense_replace"]:
            yield from mlp(f"{layer}.mlp", hidden, c["intermediate_size"])
        else:
            yield Tensor(f"{layer}.mlp.gate.weight", "BF16", (experts, hidden))
            yield Tensor(f"{layer}.mlp.gate.e_score_correction_bias", "F32", (experts,))
            yield from mlp(f"{layer}.mlp.shared_experts", hidden, width * c["n_shared_experts"])
            for expert in range(experts):
                yield from mlp(f"{layer}.mlp.experts.{expert}", hidden, width)
        yield Tensor(f"{layer}.input_layernorm.weight", "BF16", (hidden,))
        yield Tensor(f"{layer}.post_attention_layernorm.weight", "BF16", (hidden,))
    yield Tensor("model.norm.weight", "BF16", (hidden,))
    yield Tensor("lm_head.weight", "BF16", (c["vocab_size"], hidden))


def cut(tensors: list[Tensor], most: int) -> list[list[Tensor]]:
    """Consecutive runs of at most `most` bytes."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_shard(path: Path, tensors: list[Tensor]) -> None:
    """Header in full, data as a hole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name)):
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.truncate(8 + len(text) + offset)


def write_deepseek_v3(directory: Path | str) -> None:
    """config.json, index and 135 sparse shards in `directory`, which is made if it is absent."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CONFIG, directory / "config.json")
    tensors = list(model(json.loads(CONFIG.read_text())))
    shards = cut(tensors, SHARD_BYTES)
    if (len(tensors), len(shards)) != (TENSORS, SHARDS):
        raise AssertionError(f"{len(tensors)} tensors in {len(shards)} shards")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        write_shard(directory / name, shard)
        weight_map.update((tensor.name, name) for tensor in shard)
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/make_deepseek_v3.py DIRECTORY")
    write_deepseek_v3(sys.argv[1])
