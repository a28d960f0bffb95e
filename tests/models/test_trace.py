"""The traced graph: what each node says of itself, and what cannot be traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hmc.blocks import Embedding, Linear
from hmc.checkpoint.config import load_config
from hmc.errors import CompileError
from hmc.graph import PLAIN, meta
from hmc.graph.printer import graph_text
from hmc.models import load
from hmc.ops import OPS
from hmc.passes.graph.trace import trace

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def test_deepseek_v3_at_full_size() -> None:
    graph = trace(load(load_config(CONFIGS / "deepseek-v3")).module)
    graph.graph.lint()
    nodes = {node.name: meta(node) for node in graph.graph.nodes}
    attention = (
        15  # norm, 3 for q, kv_a, 2 items, latent norm, 2 rotary, mla, o, add, norm, last add
    )
    dense, routed = 5, 9  # gate, up, silu, mul, down; gate, route, experts, those five, add
    ends = 6  # ids, positions, embedding, norm, lm_head, output
    assert len(nodes) == ends + 61 * attention + 3 * dense + 58 * routed
    assert {about.kind for about in nodes.values()} <= PLAIN | OPS.keys()
    assert {about.layer for about in nodes.values()} == set(range(-1, 61))
    experts = nodes["layers_60_mlp_experts"]
    assert (experts.width, experts.layer, experts.attr("n")) == (7168, 60, 2048)
    gate, _, _ = experts.weights
    assert gate.name.format(e=255) == "model.layers.60.mlp.experts.255.gate_proj.weight"
    assert (gate.shape, gate.experts, gate.linear) == ((2048, 7168), 256, True)
    assert all(weight.device.type == "meta" for weight in graph.parameters())


def test_formats_follow_the_readers(checkpoint: Callable[..., Path]) -> None:
    def traced(family: str) -> dict[str, str]:
        graph = trace(load(load_config(checkpoint(family, "f32"))).module)
        return {node.name: meta(node).dtype for node in graph.graph.nodes}

    deepseek = traced("deepseek_v3")
    assert deepseek["layers_1_input_layernorm"] == "bf16"
    assert deepseek["layers_1_post_attention_layernorm"] == "bf16"
    assert deepseek["layers_1_self_attn_q_a_layernorm"] == "bf16"
    assert deepseek["layers_1_self_attn_kv_a_layernorm"] == "f32"
    assert deepseek["layers_1_self_attn_mla"] == "bf16"
    assert deepseek["norm"] == "bf16"
    qwen = traced("qwen3_moe")
    assert qwen["layers_0_self_attn_q_norm"] == "f32"
    assert qwen["layers_0_self_attn_k_norm"] == "f32"


def test_router_gates_are_marked(checkpoint: Callable[..., Path]) -> None:
    graph = trace(load(load_config(checkpoint("deepseek_v3", "f32"))).module)
    marked = [node.name for node in graph.graph.nodes if dict(meta(node).attrs).get("router")]
    assert marked == ["layers_1_mlp_gate", "layers_2_mlp_gate"]


def test_dump(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HMC_DUMP", str(tmp_path))
    graph = trace(load(load_config(checkpoint("mixtral", "f32"))).module)
    assert (tmp_path / "00-trace.txt").read_text() == graph_text(graph.graph)


class _Unknown(nn.Module):
    """A model file that does arithmetic of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Embedding(5, 4)
        self.head = Linear(4, 5)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return torch.cumsum(self.head(self.embed(ids)), -1)


def test_unknown_operations_are_named() -> None:
    with pytest.raises(CompileError, match="cumsum"):
        trace(_Unknown())
