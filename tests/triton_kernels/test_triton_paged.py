"""Decode that attends by FlashInfer, which a module of the same signature plays, against a CPU
plan's engine; and what a plan that asks for it is refused for."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flashinfer_stub
import numpy as np
import pytest
from click.testing import CliRunner

from hmc.cli import run_command
from hmc.cli.show_command import command as show
from hmc.codegen.triton import library
from hmc.compiler import compile as compile_plan
from hmc.errors import MachineError, UsageError, VerifyError
from hmc.ops import OPS
from hmc.passes.place.decode_attention import DecodeAttention
from hmc.passes.place.memory import accounted
from hmc.plan import Plan, save_plan, verify_plan
from hmc.plan.memory import PAGED_SCRATCH
from hmc.runtime.device_ops.gpu import table
from hmc.runtime.device_ops.shares import Fixed

BENCH = importlib.import_module("test_binding")


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library computes heads of any size: those of tests are small."""
    for name in ("attention", "mla"):
        monkeypatch.setitem(OPS, name, replace(OPS[name], paged=lambda attrs, weights: ""))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but attention in decode is computed as where the CPU plays a GPU."""
    pytest.importorskip("triton")
    interpreted = importlib.import_module("library_interpreted")
    monkeypatch.setattr(library, "kernels", interpreted.kernels)
    monkeypatch.setattr(library, "latent_kernels", interpreted.latent_kernels)
    monkeypatch.setattr(table, "computes", lambda device: True)
    monkeypatch.setattr(table, "TRITON_OPS", {})
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_stub.MODULE)  # type: ignore[arg-type]
    monkeypatch.setattr(flashinfer_stub, "WRAPPERS", [])


def plan_of(directory: Path, patch: pytest.MonkeyPatch) -> Plan:
    plan = BENCH.compiled.__wrapped__(patch)(directory, 1)
    plan = accounted(DecodeAttention("flashinfer").run(plan, None))  # type: ignore[arg-type]
    verify_plan(plan)
    return plan


@pytest.mark.few(1)
@pytest.mark.parametrize(("family", "quant"), [("deepseek_v3", "fp8"), ("mixtral", "bf16")])
def test_decode_by_the_library(
    family: str, quant: str, played: None, of_any_size: None, checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    directory = checkpoint(family, quant)
    plan = plan_of(directory, monkeypatch)
    with BENCH.bench(directory, plan) as found:
        phases, rows = found.binding.phases, BENCH.Errors()
        prompts = [BENCH.ids_of(75), BENCH.ids_of(40, 3)]
        expected = [BENCH.host_logits(found, ids) for ids in prompts]
        sequences = [found.kv.open(), found.kv.open()]
        for sequence, ids, first in zip(sequences, prompts, (63, 20), strict=True):
            found.run(phases["prefill.host"], [(sequence, ids[:first])])
        for step in range(2):  # the first sequence comes to its second page
            at = 63 + step, 20 + step
            both = [(s, ids[a : a + 1]) for s, ids, a in zip(sequences, prompts, at, strict=True)]
            wanted = np.stack([logits[a] for logits, a in zip(expected, at, strict=True)])
            rows.add(found.run(phases["decode.dual" if step % 2 else "decode"], both), wanted)
        got = found.run(phases["decode"], [(sequences[0], prompts[0][65:66])])
        rows.add(got, expected[0][65:66])
        rows.check()
        assert len({wrapper.planned for wrapper in flashinfer_stub.WRAPPERS}) == 1
        whole = family == "deepseek_v3"  # whose first layer takes both lanes at once
        assert len(flashinfer_stub.WRAPPERS) == 3 + whole  # decode's, and one a lane
        fixed_tensors(found, prompts[0][66:68], expected[0][66:68], sequences[0])


def fixed_tensors(found: Any, ids: Any, expected: Any, sequence: Any) -> None:
    """Calls of the same tensors have one wrapper, whose buffers are written anew."""
    bound, fixed, rows = found.binding.phases["decode"], Fixed(128), BENCH.Errors()
    for number in range(len(ids)):
        found.kv.reserve(sequence, 1)
        at, row = np.array([sequence.length], np.int32), np.array([sequence.row], np.int32)
        wanted = np.zeros(1, np.int32)
        sequence.length += 1
        call = bound.call(ids[number : number + 1], at, row, wanted, fixed)
        for position in BENCH.handed_over(bound.phase):
            bound.works[position](call)
        rows.add(bound.logits(call).copy(), expected[number : number + 1])
    rows.check()
    of_graphs = [wrapper for wrapper in flashinfer_stub.WRAPPERS if wrapper.graph]
    assert len(of_graphs) == 1 and of_graphs[0].ran >= len(ids)


def test_without_the_library(
    played: None, of_any_size: None, checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    directory = checkpoint("mixtral", "bf16")
    plan = plan_of(directory, monkeypatch)
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # type: ignore[arg-type]
    with (
        pytest.raises(MachineError, match=r"not installed: pip install 'hmc\[flashinfer\]'"),
        BENCH.bench(directory, plan),
    ):
        pass


def test_a_plan_names_it(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("mixtral", "bf16")
    plan = BENCH.compiled.__wrapped__(monkeypatch)(directory, 1)
    with pytest.raises(UsageError, match=r"--attention flashinfer: layer 0 has heads of"):
        DecodeAttention("flashinfer").run(plan, None)  # type: ignore[arg-type]
    machine = BENCH.machine(1).model_copy(update={"gpus": ()})
    with pytest.raises(UsageError, match="no GPU attends in decode"):
        compile_plan(directory, machine=machine, attention="flashinfer")
    monkeypatch.setitem(
        OPS, "attention", replace(OPS["attention"], paged=lambda attrs, weights: "")
    )
    named = plan_of(directory, monkeypatch)
    used = {key for phase in named.phases for step in phase.steps for key in step.kernels}
    assert any(key.startswith("flashinfer:attention-heads") for key in used)
    assert [each.choice for each in named.decisions if each.by == "decode_attention"]
    scratch = [{i.detail: i.bytes for i in p.ledger if i.kind == "scratch"} for p in (plan, named)]
    assert sum(scratch[1].values()) - sum(scratch[0].values()) == PAGED_SCRATCH
    save_plan(named, tmp_path / "named.hmp")
    told = CliRunner().invoke(show, [str(tmp_path / "named.hmp")]).output
    assert "flashinfer:attention-heads" in told
    assert run_command._kernels(named).endswith(", attention by flashinfer")
    monkeypatch.undo()
    with pytest.raises(VerifyError, match="a device computes it by triton:attention"):
        verify_plan(named)


def test_sizes_that_it_has() -> None:
    grouped, latent = OPS["attention"].paged, OPS["mla"].paged
    assert grouped is not None and latent is not None
    heads = {"heads": 8, "kv_heads": 2, "head_dim": 128, "v_dim": 128, "scale": 0.1}
    assert grouped(heads, ()) == "" and grouped(heads | {"window": 512}, ()) == ""
    assert grouped(heads | {"v_dim": 64}, ()) == "heads of 128 and 64 columns"
    assert grouped(heads | {"softcap": 30.0}, ("sinks",)) == "sinks, softcap"
    assert latent({"rank": 512, "rope": 64}, ()) == ""
    assert latent({"rank": 256, "rope": 64}, ()) == "latents of 256 and 64 columns"


@pytest.mark.parametrize(
    "stub", [flashinfer_stub.BatchDecodeWithPagedKVCacheWrapper,
             flashinfer_stub.BatchMLAPagedAttentionWrapper], ids=lambda stub: stub.__name__,
)  # fmt: skip
def test_the_library_takes_what_its_player_takes(stub: type) -> None:
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("FlashInfer is not installed: arguments were read from 0.5.0, 0.6.18, 0.7.4")
    taken = arguments(Path(next(iter(spec.submodule_search_locations))), stub.__name__)
    for name in ("__init__", "plan", "run"):
        own = list(inspect.signature(getattr(stub, name)).parameters.values())
        first = [each.name for each in own if each.kind is each.POSITIONAL_OR_KEYWORD]
        assert any(names[: len(first)] == first for names in taken[name]) or name != "__init__"
        by_name = {each for names in taken[name] + taken.get(f"_{name}_impl", []) for each in names}
        assert {each.name for each in own} <= by_name


def arguments(folder: Path, name: str) -> dict[str, list[list[str]]]:
    """By function of a class in the library's source, its arguments in each of its definitions."""
    found: dict[str, list[list[str]]] = {}
    for path in folder.rglob("*.py"):
        if f"class {name}:" not in (text := path.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                for each in node.body:
                    if isinstance(each, ast.FunctionDef):
                        own = [arg.arg for arg in (*each.args.args, *each.args.kwonlyargs)]
                        found.setdefault(each.name, []).append(own)
    assert found, f"{folder} has no class {name}"
    return found
