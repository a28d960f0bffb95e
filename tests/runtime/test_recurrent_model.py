"""A model whose layers keep nothing but states of linear attention, from a checkpoint to logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models.reference import load_model, run
from played import executor
from safetensors.torch import save_file
from split_plans import STREAM, split_plan
from torch import Tensor, nn

import hmc
from hmc.blocks import Linear, RMSNorm
from hmc.blocks.recurrent import LinearAttention
from hmc.checkpoint.config import ModelConfig, load_config
from hmc.models import FAMILIES, Family, load, weight_specs
from hmc.models.common import CausalLM, norm_eps
from hmc.models.routing import softmax_moe
from hmc.runtime.executor import Executor

CONFIG = {
    "model_type": "linear",
    "architectures": ["LinearForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
}
HEADS, KEY_HEADS, KEYS, VALUES = 4, 2, 16, 24


class Layer(nn.Module):
    """Decays are one a head, or in layer 1 one a channel; layer 2 has no delta rule."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, eps = config.require_int("hidden_size"), norm_eps(config)
        channels, self.delta = index == 1, index != 2
        self.input_layernorm = RMSNorm(hidden, eps)
        self.q, self.k = (Linear(hidden, KEY_HEADS * KEYS) for _ in range(2))
        self.v, self.o = Linear(hidden, HEADS * VALUES), Linear(HEADS * VALUES, hidden)
        self.a = Linear(hidden, HEADS * (KEYS if channels else 1))
        if self.delta:
            self.b = Linear(hidden, HEADS)
        self.mix = LinearAttention(
            HEADS, KEY_HEADS, KEYS, VALUES, 0.25, channels=channels, delta=self.delta
        )
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = softmax_moe(config)

    @property
    def attention_half(self) -> tuple[nn.Module, ...]:
        """The modules of the layer's first half."""
        gates = (self.b,) if self.delta else ()
        return self.input_layernorm, self.q, self.k, self.v, self.a, self.o, self.mix, *gates

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        x = self.input_layernorm(h)
        k = self.k(x).reshape(-1, KEY_HEADS, KEYS)
        k = (k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)).reshape(-1, KEY_HEADS * KEYS)
        given = [self.q(x), k, self.v(x), torch.sigmoid(self.a(x))]
        if self.delta:
            given.append(torch.sigmoid(self.b(x)))
        h = h + self.o(self.mix(*given))
        return h + self.mlp(self.post_attention_layernorm(h))  # type: ignore[no-any-return]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random checkpoint of the family in bf16."""
    family = Family("linear", lambda config: CausalLM(config, lambda index: Layer(config, index)))
    monkeypatch.setitem(FAMILIES, "linear", family)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, spec in sorted(weight_specs(load(load_config(tmp_path)).module).items()):
        for each in [name.format(e=e) for e in range(spec.experts)] or [name]:
            noise = torch.randn(spec.shape, generator=generator)
            gain = 1.0 if name.endswith("embed_tokens.weight") else 1 / math.sqrt(spec.shape[-1])
            tensors[each] = (1 + 0.1 * noise if noise.ndim == 1 else gain * noise).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def answers(found: Executor, ids: list[int], phase: str) -> list[np.ndarray]:
    """Logits of a prompt's last three tokens, two of which are decoded."""
    sequence = found.open()
    *_, last = found.prefill(sequence, np.array(ids[:-2], np.int32), phase=phase)
    rows = [np.array(last).reshape(-1)]
    for each in ids[-2:]:
        rows.append(found.decode([sequence], np.array([each], np.int32))[0].copy())
    found.release(sequence)
    return rows


@pytest.mark.slow
def test_chunks_and_decode_equal_the_reference(directory: Path) -> None:
    ids = np.random.default_rng(0).integers(2, CONFIG["vocab_size"], 150).tolist()
    expected = run(load_model(directory).module, ids).numpy()[-3:]
    plan = hmc.compile(directory, max_context=320, max_chunk=96, threads=2)
    with hmc.Engine(plan) as engine:
        found = [answers(engine.executor, ids, "prefill.host")]
    divided = split_plan(directory, max_context=320, max_chunk=96)
    with executor(divided, directory) as devices:
        found += [answers(devices, ids, phase) for phase in ("prefill.host", STREAM)]
    for rows in found:
        for row, wanted in zip(rows, expected, strict=True):
            assert np.linalg.norm(row - wanted) < 0.02 * np.linalg.norm(wanted)
