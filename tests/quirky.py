"""A family of tests alone, whose quirks are lines of plain torch: norms by 1 + w, an output gate on
attention, queries of unit length, half residuals, a clamped activation, a shared expert with a gate
of one column, logits under a soft cap. `write` makes a checkpoint of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from hmc.blocks import Attention, Block, Experts, GatedMLP, Linear, Rotary, Route, Scoring, Vector
from hmc.checkpoint.config import ModelConfig, load_config
from hmc.models import Family, load, weight_specs
from hmc.models.common import CausalLM
from hmc.models.rope import rope

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS, INNER, VOCAB = 96, 4, 2, 24, 8, 40, 101
CLAMPED = (
    "(minimum(maximum(up, -7.0), 7.0) + 1.0) * minimum(gate, 7.0)"
    " * sigmoid(1.702 * minimum(gate, 7.0))"
)


class PlusOneNorm(nn.Module):
    """x / rms(x) * (1 + w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = Vector(width)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight())


class GatedAttention(nn.Module):
    """Attention times sigmoid of a gate, with queries of unit length by head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        angles = rope(config, DIM)
        self.q_proj, self.gate_proj = (Linear(HIDDEN, HEADS * DIM) for _ in range(2))
        self.k_proj, self.v_proj = (Linear(HIDDEN, KV_HEADS * DIM) for _ in range(2))
        self.o_proj = Linear(HEADS * DIM, HIDDEN)
        self.q_scale = Vector(DIM)
        self.q_rotary = Rotary(HEADS, DIM, angles.inv_freq)
        self.k_rotary = Rotary(KV_HEADS, DIM, angles.inv_freq)
        self.attention = Attention(HEADS, KV_HEADS, DIM, DIM, 1.0)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (HEADS, DIM))
        q = q / torch.sqrt(q.square().sum(-1, keepdim=True) + 1e-6) * self.q_scale()
        q = self.q_rotary(q.flatten(-2), positions)
        k = self.k_rotary(self.k_proj(x), positions)
        mixed = self.attention(q, k, self.v_proj(x))
        return self.o_proj(mixed * torch.sigmoid(self.gate_proj(x)))  # type: ignore[no-any-return]


class SparseMoe(nn.Module):
    """Routed experts with a clamped activation, and a shared one with a gate of one column."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.shared_gate = Linear(HIDDEN, EXPERTS), Linear(HIDDEN, 1)
        self.route = Route(EXPERTS, 2, Scoring.SOFTMAX_ALL, normalise=True)
        self.experts = Experts(EXPERTS, HIDDEN, INNER, 2, act=CLAMPED)
        self.shared = GatedMLP(HIDDEN, INNER)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared(x) * functional.sigmoid(self.shared_gate(x))
        return self.experts(x, self.route(self.gate(x))) + shared  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A pre-norm layer whose residuals are halved."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            PlusOneNorm(HIDDEN) for _ in range(2)
        )
        self.self_attn, self.mlp = GatedAttention(config), SparseMoe()

    @property
    def attention_half(self) -> tuple[nn.Module, ...]:
        """The modules of the layer's first half."""
        return self.input_layernorm, self.self_attn

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        h = h + 0.5 * self.self_attn(self.input_layernorm(h), positions)
        return h + 0.5 * self.mlp(self.post_attention_layernorm(h))  # type: ignore[no-any-return]


class Quirky(CausalLM):
    """The decoder with its logits under a soft cap."""

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return 30 * torch.tanh(super().forward(ids, positions) / 30)


def build(config: ModelConfig) -> nn.Module:
    """The model of a config.json."""
    return Quirky(config, lambda index: Layer(config))


FAMILY = Family("quirky", build)


def write(directory: Path, family: str = "quirky", layers: int = 2, **more: str) -> Path:
    """A random checkpoint in bf16, with the family known to hmc.models as "quirky"."""
    config = {
        "model_type": family,
        "architectures": ["Quirky"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "eos_token_id": 1,
        **more,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    specs = weight_specs(load(load_config(directory)).module)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in sorted(specs):
        for expert in range(max(1, specs[name].experts)):
            noise = torch.randn(specs[name].shape, generator=generator)
            value = noise / noise.shape[-1] ** 0.5 if noise.ndim == 2 else 0.3 * noise
            if "embed" in name:
                value = noise
            tensors[name.format(e=expert)] = (4 * value if "lm_head" in name else value).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def reference(directory: Path) -> nn.Module:
    """The model of a checkpoint in float32 on the CPU."""
    module = load(load_config(directory)).module.to_empty(device="cpu")
    tensors = load_file(directory / "model.safetensors")
    for path, block in module.named_modules():
        for spec in block.stored(path) if isinstance(block, Block) else ():
            names = [spec.name.format(e=e) for e in range(spec.experts)] or [spec.name]
            parts = [tensors[name].float() for name in names]
            getattr(block, spec.role).copy_(torch.stack(parts) if spec.experts else parts[0])
    return module
