"""Layers over several residual streams side by side (hyper-connections) as families put them
together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmc.blocks import HyperCopy, HyperIn, HyperOut, HyperWeights, Linear, RMSNorm, place
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import norm_eps
from hmc.ops.hyper import MIXED, READ


def spread(config: ModelConfig) -> nn.Module:
    """Makes streams of embeddings, a part of the first layer."""
    return place(HyperCopy(config.require_int("hidden_size"), streams(config)), 0, "attention")


def streams(config: ModelConfig) -> int:
    """How many there are."""
    return config.get_int("hc_mult", 4, minimum=2)


class ReadStreams(nn.Module):
    """What is read of the streams, and the weights for that and for what is written: `parts` of
    them (hmc/ops/hyper.py).
    """

    def __init__(self, config: ModelConfig, parts: int, magnitude: float = 2.0) -> None:
        super().__init__()
        hidden, count = config.require_int("hidden_size"), streams(config)
        rounds = config.get_int("hc_sinkhorn_iters", 20, minimum=1) if parts == MIXED else 0
        eps = config.get_float("hc_eps", 1e-6)
        self.eps = norm_eps(config)
        self.weights = HyperWeights(count, parts, eps, iterations=rounds, magnitude=magnitude)
        self.fn = Linear(count * hidden, self.weights.width, plain=True)
        self.read = HyperIn(hidden, count, parts)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        level = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        weights = self.weights(self.fn(level))
        return self.read(h, weights), weights


class LastRead(ReadStreams):
    """What the last norm reads of the streams."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, READ)

    def forward(self, h: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h)[0]


class MeanRead(nn.Module):
    """The mean of the streams, for the last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden, self.count = config.require_int("hidden_size"), streams(config)

    def forward(self, h: Tensor) -> Tensor:
        total = h[:, : self.hidden]
        for first in range(self.hidden, self.count * self.hidden, self.hidden):
            total = total + h[:, first : first + self.hidden]
        return total * (1 / self.count)


class Half(nn.Module):
    """One half of a layer between reading the streams and writing them: `inner`, called with what
    its norm makes of what is read, and with what the half is `given` besides.
    """

    def __init__(
        self, config: ModelConfig, inner: nn.Module, parts: int = MIXED, magnitude: float = 2.0
    ) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        self.hc = ReadStreams(config, parts, magnitude)
        self.norm = RMSNorm(hidden, norm_eps(config))
        self.inner = inner
        self.write = HyperOut(hidden, streams(config), parts)

    def forward(self, h: Tensor, *given: Tensor) -> Tensor:
        x, weights = self.hc(h)
        return self.write(h, weights, self.inner(self.norm(x), *given))  # type: ignore[no-any-return]


class StreamLayer(nn.Module):
    """A layer over several streams, as `CausalLM` calls it."""

    def __init__(self, attention: Half, mlp: Half) -> None:
        super().__init__()
        self.attn, self.ffn = attention, mlp

    @property
    def attention_half(self) -> tuple[nn.Module, ...]:
        """The modules of the layer's first half."""
        return (self.attn,)

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        return self.ffn(self.attn(h, positions))  # type: ignore[no-any-return]
