"""The checkpoints of the tests are ones hmc reads: every tensor used, in the format meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, VOCAB, write_checkpoint
from tokenizers import Tokenizer

from hmc.checkpoint import Checkpoint
from hmc.models import load, weight_specs


@pytest.mark.parametrize("quant", ["bf16", "fp16", "f32", "fp8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_found(checkpoint: Callable[..., Path], family: str, quant: str) -> None:
    opened = Checkpoint.open(checkpoint(family, quant))
    model = load(opened.config)
    used: set[str] = set()
    formats: dict[str, str] = {}
    for spec in weight_specs(model.module).values():
        for name in [spec.name.format(e=e) for e in range(spec.experts)] or [spec.name]:
            source = opened.resolve(name, spec.shape, linear=spec.linear)
            used.update(source.tensor_names)
            formats[name] = source.format
    opened.check_unused(used)
    assert formats["model.layers.2.self_attn.o_proj.weight"] == quant
    if quant in ("fp8", "int4"):
        assert formats["model.embed_tokens.weight"] == "bf16"
        assert {formats[name] for name in formats if name.endswith(".gate.weight")} == {"bf16"}


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    one, two, three = (
        write_checkpoint(tmp_path / str(seed), "mixtral", "fp8", seed=seed // 2, shards=2)
        for seed in (0, 1, 2)
    )
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()
    name = "model-00002-of-00002.safetensors"
    assert (one / name).read_bytes() != (three / name).read_bytes()


def test_bf16_scales(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, "mixtral", "fp8", scale_dtype=torch.bfloat16, layers=1)
    source = Checkpoint.open(directory).resolve(
        "model.layers.0.self_attn.q_proj.weight", (192, 192), linear=True
    )
    assert source.dtypes == ("F8_E4M3", "BF16")


def test_tokenizer_speaks_any_text(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("mixtral", "bf16", with_tokenizer=True)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "the river — 你好, ёж!\n\tx"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= VOCAB
    assert (tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")) == (0, 1)
