"""Every pass by golden text and numeric equality, and broken graphs that the manager must catch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.fx

import hmc
from hmc.errors import KernelError, PassFailedError, VerifyError
from hmc.graph import NodeMeta, meta
from hmc.graph.printer import graph_text
from hmc.passes import GRAPH, PLAN
from hmc.passes.emit.emit import emit
from hmc.passes.graph.canonicalise import Canonicalise
from hmc.passes.graph.fuse import Fuse
from hmc.passes.graph.lower import Lower
from hmc.passes.manager import configured, run_graph, run_plan
from hmc.passes.place.budget import capacity
from hmc.passes.place.needs import needs_of
from hmc.passes.records import Base, Target
from hmc.plan import Decision, Goals, Plan
from hmc.plan.options import Options

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
Lowering = Callable[..., tuple[torch.fx.GraphModule, Target]]


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_graph_is_the_golden_one(
    family: str, lowering: Lowering, golden: Callable[[str, str], None]
) -> None:
    graph, target = lowering(family)
    run_graph(GRAPH, graph, target)
    golden(f"passes/{family}.txt", graph_text(graph.graph))


@pytest.mark.parametrize("family", FAMILIES)
def test_rewrites_keep_the_values(family: str, lowering: Lowering) -> None:
    graph, target = lowering(family)
    graph.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in graph.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    ids = torch.randint(0, target.info.vocab, (9,), generator=generator)
    positions = torch.arange(9)
    before = graph(ids, positions)
    run_graph((Canonicalise(), Fuse()), graph, target)
    after = graph(ids, positions)
    kinds = {meta(node).kind for node in graph.graph.nodes}
    assert "add_norm" in kinds
    assert torch.allclose(before, after, rtol=2e-4, atol=2e-4 * float(before.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_and_weight_is_decided_with_a_reason(family: str, lowering: Lowering) -> None:
    base = _base(lowering, family)
    plan = run_plan(PLAN, base)
    used = {key for phase in plan.phases for step in phase.steps for key in step.kernels}
    assert used == plan.kernels.keys()
    assert all(decision.reason for decision in plan.decisions)
    by = {decision.by for decision in plan.decisions}
    assert by >= {"fuse", "lower", "budget", "expert_placement"}


def _base(lowering: Lowering, family: str) -> Base:
    """A family's plan as emitted."""
    graph, target = lowering(family)
    lowered, options = run_graph(GRAPH, graph, target), Options()
    for node in graph.graph.nodes:
        about = meta(node)
        if about.kind not in ("input", "output", "item"):
            assert {phase for phase, _ in about.kernels} == {"decode", "prefill.host"}
    needs = needs_of(lowered, Options())
    room = capacity(needs, target, options)
    return Base(emit(lowered, room, options, Goals()), needs, room.budget)


def test_needs_are_what_the_ledger_prints(lowering: Lowering) -> None:
    base = _base(lowering, "deepseek_v3")
    ledger = {item.kind: item.bytes for item in run_plan(PLAN, base).ledger}
    assert base.needs.kinds.items() <= ledger.items()
    assert ledger["routed experts"] == base.needs.experts
    assert base.needs.dense + base.needs.table == sum(base.needs.kinds.values())


def test_passes_take_the_options_that_their_fields_name() -> None:
    placed, _, streamed, *_ = configured(PLAN, Options(ring=4, vram=7))
    assert (placed, streamed) == (PLAN[0], type(PLAN[2])(ring=4))  # type: ignore[call-arg]


def test_a_mixed_pair_is_not_fused(lowering: Lowering, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, target = lowering("deepseek_v3")
    plain = Target.source

    def source(self: Target, weight: Any) -> Any:
        found = plain(self, weight)
        if "shared_experts.up_proj" in weight.name:
            return [replace(found[0], format="bf16")]
        return found

    monkeypatch.setattr(Target, "source", source)
    lowered = run_graph((Canonicalise(), Fuse()), graph, target)
    kept = [d for d in lowered.decisions if d.choice == "not fused"]
    assert len(kept) == 2
    assert all("fp8 and bf16" in decision.reason for decision in kept)


def test_a_kernel_that_cannot_be_built_ends_compiling(
    lowering: Lowering, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, target = lowering("qwen3_moe")
    monkeypatch.setattr("hmc.passes.graph.lower.BLOCK", 7)
    with pytest.raises(KernelError, match="kernel attention needs block even, not 7"):
        run_graph((Canonicalise(), Fuse(), Lower()), graph, target)


@dataclass(frozen=True)
class _DropsMeta:
    name: ClassVar[str] = "drops_meta"

    def run(self, graph: torch.fx.GraphModule, target: Target) -> Sequence[Decision]:
        del next(iter(graph.graph.nodes)).meta["hmc"]
        return ()


@dataclass(frozen=True)
class _UnknownKind(_DropsMeta):
    name: ClassVar[str] = "unknown_kind"

    def run(self, graph: torch.fx.GraphModule, target: Target) -> Sequence[Decision]:
        next(iter(graph.graph.nodes)).meta["hmc"] = NodeMeta("mystery", -1, 1, "f32")
        return ()


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
    graph, target = lowering("mixtral")
    with pytest.raises(VerifyError, match=message):
        run_graph((broken,), graph, target)


@dataclass(frozen=True)
class _LosesAStep:
    name: ClassVar[str] = "loses_a_step"

    def run(self, plan: Plan, base: Base) -> Plan:
        first, *rest = plan.phases
        return plan.model_copy(
            update={"phases": (first.model_copy(update={"steps": first.steps[1:]}), *rest)}
        )


def test_the_manager_names_the_pass_that_broke_the_plan(lowering: Lowering) -> None:
    with pytest.raises(VerifyError, match=r"after pass loses_a_step: phase prefill\.host, step"):
        run_plan((_LosesAStep(),), _base(lowering, "mixtral"))


def test_rotary_input_with_another_reader_is_refused(lowering: Lowering) -> None:
    graph, target = lowering("mixtral")
    lowered = run_graph(GRAPH, graph, target)
    room = capacity(needs_of(lowered, Options()), target, Options())
    rotary = next(n for n in graph.graph.nodes if meta(n).kind == "rotary")
    attention = next(n for n in graph.graph.nodes if meta(n).kind == "attention")
    attention.replace_input_with(attention.args[2], rotary.args[0])
    with pytest.raises(PassFailedError, match="works in place"):
        emit(lowered, room, Options(), Goals())


def test_dumps_and_debug_text(
    checkpoint: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = checkpoint("mixtral", "fp8")
    monkeypatch.setenv("HMC_DUMP", str(tmp_path))
    monkeypatch.setenv("HMC_DEBUG", "2")
    hmc.compile(model, max_context=64)
    graph = ["00-trace", "01-canonicalise", "02-fuse", "03-lower"]
    plan = ["04-emit", "05-expert_placement", "06-dual_batch", "07-stream_load"]
    plan += ["08-decode_attention", "09-lm_head", "10-memory"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == graph + plan
    assert "host KV cache: " in (tmp_path / "10-memory.txt").read_text()
    text = capsys.readouterr().err
    assert "fuse:" in text
    assert "add_norm" in text
