"""Every pass by golden text and numeric equality, and broken graphs that the manager must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.fx

import hmc
from hmc.errors import KernelError, PassFailedError, UnsupportedError, VerifyError
from hmc.graph import NodeMeta, meta
from hmc.graph.printer import graph_text
from hmc.passes import PIPELINE, Context, run_pipeline
from hmc.passes.context import ranges
from hmc.passes.graph.canonicalise import Canonicalise
from hmc.passes.graph.fuse import Fuse
from hmc.passes.graph.lower import Fp8Lowering

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
Lowering = Callable[..., tuple[torch.fx.GraphModule, Context]]


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_graph_is_the_golden_one(
    family: str, lowering: Lowering, golden: Callable[[str, str], None]
) -> None:
    graph, context = lowering(family)
    run_pipeline(PIPELINE, graph, context)
    golden(f"passes/{family}.txt", graph_text(graph.graph))


@pytest.mark.parametrize("family", FAMILIES)
def test_rewrites_keep_the_values(family: str, lowering: Lowering) -> None:
    graph, context = lowering(family)
    graph.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in graph.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    ids = torch.randint(0, context.info.vocab, (9,), generator=generator)
    positions = torch.arange(9)
    before = graph(ids, positions)
    run_pipeline((Canonicalise(), Fuse()), graph, context)
    after = graph(ids, positions)
    kinds = {meta(node).kind for node in graph.graph.nodes}
    assert "add_norm" in kinds
    assert torch.allclose(before, after, rtol=2e-4, atol=2e-4 * float(before.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_and_weight_is_decided_with_a_reason(family: str, lowering: Lowering) -> None:
    graph, context = lowering(family)
    run_pipeline(PIPELINE, graph, context)
    for node in graph.graph.nodes:
        about = meta(node)
        if about.kind not in ("input", "output", "item"):
            assert {phase for phase, _ in about.kernels} == {"decode", "prefill.host"}
            assert about.device == "host"
    assert all(decision.reason for decision in context.decisions)
    by = {decision.by for decision in context.decisions}
    assert by >= {"fuse", "fp8_lowering", "expert_placement", "memory_ledger"}


def test_a_mixed_pair_is_not_fused(lowering: Lowering, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, context = lowering("deepseek_v3")
    plain = Context.source

    def source(self: Context, weight: Any) -> Any:
        found = plain(self, weight)
        if "shared_experts.up_proj" in weight.name:
            return [replace(found[0], format="bf16")]
        return found

    monkeypatch.setattr(Context, "source", source)
    run_pipeline((Canonicalise(), Fuse()), graph, context)
    kept = [d for d in context.decisions if d.choice == "not fused"]
    assert len(kept) == 2
    assert all("fp8 and bf16" in decision.reason for decision in kept)


def test_a_kernel_that_cannot_be_built_ends_compiling(lowering: Lowering) -> None:
    graph, context = lowering("qwen3_moe", kv_block=7)
    with pytest.raises(KernelError, match="kernel attention needs block even, not 7"):
        run_pipeline((Canonicalise(), Fuse(), Fp8Lowering()), graph, context)


@dataclass(frozen=True)
class _DropsMeta:
    name: ClassVar[str] = "drops_meta"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    establishes: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        del next(iter(graph.graph.nodes)).meta["hmc"]


@dataclass(frozen=True)
class _UnknownKind(_DropsMeta):
    name: ClassVar[str] = "unknown_kind"

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        next(iter(graph.graph.nodes)).meta["hmc"] = NodeMeta("mystery", -1, 1, "f32")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_DropsMeta(), "after pass drops_meta: node ids carries no NodeMeta"),
        (_UnknownKind(), "after pass unknown_kind: unknown op mystery"),
    ],
)
def test_the_manager_names_the_pass_that_broke_the_graph(
    broken: Any, message: str, lowering: Lowering
) -> None:
    graph, context = lowering("mixtral")
    with pytest.raises(VerifyError, match=message):
        run_pipeline((broken,), graph, context)


def test_a_pass_before_its_requirement_is_refused(lowering: Lowering) -> None:
    graph, context = lowering("mixtral")
    with pytest.raises(PassFailedError, match="fuse requires canonical"):
        run_pipeline((Fuse(),), graph, context)


def test_rotary_input_with_another_reader_is_refused(lowering: Lowering) -> None:
    graph, context = lowering("mixtral")
    run_pipeline(PIPELINE[:5], graph, context)
    rotary = next(n for n in graph.graph.nodes if meta(n).kind == "rotary")
    attention = next(n for n in graph.graph.nodes if meta(n).kind == "attention")
    attention.replace_input_with(attention.args[2], rotary.args[0])
    with pytest.raises(PassFailedError, match="works in place"):
        PIPELINE[5].run(graph, context)


def test_dumps_and_debug_text(
    lowering: Lowering, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HMC_DUMP", str(tmp_path))
    monkeypatch.setenv("HMC_DEBUG", "2")
    graph, context = lowering("mixtral")
    run_pipeline(PIPELINE, graph, context)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:3] == ["00-trace.txt", "01-canonicalise.txt", "02-fuse.txt"]
    text = capsys.readouterr().err
    assert "fuse:" in text
    assert "add_norm" in text


def test_unknown_family_names_the_known_ones(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UnsupportedError, match=r"nonesuch.*deepseek_v3, kimi_k2, mixtral"):
        hmc.compile(tmp_path, dummy_weights=True)


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([2, 1, 0], "0-2")]
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
