"""Experts, routers and MLPs of families beside DeepSeek's and Qwen's, a kind a layer: prefill and
decode on the CPU and on devices played by it, against the model's own float32 reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import quirky
import torch
from played import executor
from quirky import HIDDEN, INNER
from split_plans import STREAM, split_plan
from test_quirks import HERE, IDS, Floats, assert_close, logits_of
from torch import Tensor, nn

import hmc
from hmc.blocks import Experts, GatedMLP, Linear, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models import FAMILIES, Family
from hmc.models.activations import gated, weighed
from hmc.models.common import CausalLM, DecoderLayer, GroupedQueryAttention
from hmc.models.rope import rope

NAME, EXPERTS = "expert_kinds", 12
GPT_OSS = gated("gate * sigmoid(1.702 * gate)", limit=0.5, plus=1.0)


class Mlp(nn.Module):
    """Routed experts and what stands beside them."""

    def __init__(
        self, route: Route, experts: Experts, beside: nn.Module | None, bias: bool
    ) -> None:
        super().__init__()
        self.router = Linear(HIDDEN, EXPERTS, bias=bias)
        self.route, self.experts, self.beside = route, experts, beside

    def forward(self, x: Tensor) -> Tensor:
        routed = self.experts(x, self.route(self.router(x)))
        return routed if self.beside is None else routed + self.beside(x)  # type: ignore[no-any-return]


class Ungated(nn.Module):
    """down(relu(up(x))^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Linear(HIDDEN, INNER), Linear(INNER, HIDDEN, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).square())  # type: ignore[no-any-return]


def mlp(index: int) -> Mlp:
    """gpt-oss; Llama 4 with a biased MLP beside; DeepSeek-V2's groups with scales of experts, which
    have no gates, as the MLP beside has none; SparseMixer."""
    names = ("gate_proj", "up_proj", "down_proj")
    if index == 0:
        route = Route(EXPERTS, 3, Scoring.SOFTMAX_CHOSEN, normalise=False)
        experts = Experts(EXPERTS, HIDDEN, INNER, 3, names, GPT_OSS, bias=True)
        return Mlp(route, experts, None, True)
    if index == 1:
        route = Route(EXPERTS, 3, Scoring.SIGMOID_CHOSEN, normalise=False)
        experts = Experts(EXPERTS, HIDDEN, INNER, 3, names, weighed(gated("silu(gate)")))
        beside = GatedMLP(HIDDEN, INNER, act=gated("silu(gate)", limit=0.4, after=True), bias=True)
        return Mlp(route, experts, beside, False)
    if index == 2:
        route = Route(
            EXPERTS, 3, Scoring.SOFTMAX_ALL, normalise=True, groups=4, top_groups=2, group_best=1,
            eps=0.1, factor=1.5, scale_name="router.per_expert_scale",
        )  # fmt: skip
        experts = Experts(EXPERTS, HIDDEN, INNER, 3, names, "square(relu(up))")
        return Mlp(route, experts, Ungated(), False)
    route = Route(EXPERTS, 3, Scoring.SPARSEMIXER, normalise=False, jitter=0.2)
    return Mlp(route, Experts(EXPERTS, HIDDEN, INNER, 3), GatedMLP(HIDDEN, INNER), False)


def build(config: ModelConfig) -> nn.Module:
    angles = rope(config, HIDDEN // quirky.HEADS)

    def layer(index: int) -> nn.Module:
        return DecoderLayer(config, GroupedQueryAttention(config, angles), mlp(index))

    return CausalLM(config, layer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, NAME, Family(NAME, build))
        yield quirky.write(tmp_path_factory.mktemp(NAME), NAME, layers=4, hidden_act="gelu")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Floats:
    """The reference's logits of every token."""
    with torch.inference_mode():
        model = quirky.reference(checkpoint)
        return model(torch.from_numpy(IDS), torch.arange(len(IDS))).numpy()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(
    "isa", [HERE[0], *(pytest.param(isa, marks=pytest.mark.slow) for isa in HERE[1:])]
)
def test_on_the_cpu(
    isa: str, checkpoint: Path, expected: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HMC_ISA", isa)
    plan = hmc.compile(checkpoint, max_chunk=16)
    acts = [step.attrs["act"] for step in plan.phase("decode").steps if "act" in step.attrs]
    assert acts[0] == GPT_OSS
    assert acts[-1] == "gelu(gate) * up"
    fused = [step for step in plan.phase("decode").steps if "gate_bias" in step.weights]
    assert [step.op for step in fused] == ["gate_up"]
    with hmc.Engine(plan, threads=2) as engine:
        assert_close(engine.logits(IDS.tolist()), expected)
        assert_close(engine.decode_logits(IDS.tolist()), expected)


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_on_devices(gpus: int, checkpoint: Path, expected: Floats) -> None:
    plan = split_plan(checkpoint, gpus=gpus, held=0.4)
    with executor(plan, checkpoint) as found:
        many, few = logits_of(found, STREAM, "decode")
    assert_close(many, expected[-8:])
    assert_close(few, expected[8:])
