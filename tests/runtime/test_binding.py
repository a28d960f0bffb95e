"""Schedules for GPUs, step by step in program order on CPU memory, against a CPU plan's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import prompt
from split_plans import CHOSEN, split_plan

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.compiler import compile as compile_plan
from hmc.errors import ExecutionError
from hmc.machine.detect import load_machine
from hmc.machine.model import Machine
from hmc.passes.place.budget import divide
from hmc.passes.records import Budget, Needs
from hmc.plan import Plan
from hmc.plan.ahead import handed_over
from hmc.runtime.binding.phase import Binding, BoundPhase
from hmc.runtime.device_ops import exchange
from hmc.runtime.devices.gpu import Gpu
from hmc.runtime.executor import Executor
from hmc.runtime.host.lowering import Parts
from hmc.runtime.host.pool import Pool
from hmc.runtime.memory.kv import KVCache, Sequence
from hmc.runtime.tokens.text import Text
from hmc.runtime.weights.store import WeightStore

HOST, DECODE, STREAM, DUAL = "prefill.host", "decode", "prefill.stream", "decode.dual"
BESIDE = "prefill.beside"
CPU = torch.device("cpu")


class FilledGpu(Gpu):
    """A GPU of CPU memory, filled with NaN bytes so that nothing unwritten goes unseen."""

    def __init__(self, name: str) -> None:
        super().__init__(name, CPU, lambda _: 1 << 40)

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        return super().allocate(nbytes, purpose).fill_(255)


@lru_cache
def machine(gpus: int) -> Machine:
    """This machine's CPU with the GPUs and rates of a named machine."""
    found, named = load_machine("auto"), load_machine("epyc9355-rtx5090x2")
    assert named.rates is not None
    rates = named.rates.model_copy(update={"read": named.rates.read[:1] * len(found.nodes)})
    update = {"name": "test", "gpus": named.gpus[:gpus], "rates": rates}
    return found.model_copy(update=update)


@dataclass
class Bench:
    """One checkpoint, run by a plan for GPUs and by a CPU plan."""

    plan: Plan
    parts: Parts
    binding: Binding
    kv: KVCache
    cpu: Executor
    devices: list[FilledGpu]

    def run(
        self,
        phase: BoundPhase,
        parts: list[tuple[Sequence, npt.NDArray[np.int32]]],
        wanted: npt.NDArray[np.int32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Logits of all tokens (or those wanted) of a call that appends tokens to sequences. All
        streams run in this thread, in the order in which steps are handed over."""
        positions = []
        for sequence, ids in parts:
            self.kv.reserve(sequence, len(ids))
            positions.append(np.arange(sequence.length, sequence.length + len(ids), dtype=np.int32))
            sequence.length += len(ids)
        tables = [np.full(len(ids), sequence.row, np.int32) for sequence, ids in parts]
        ids = np.concatenate([ids for _, ids in parts])
        rows = np.arange(len(ids), dtype=np.int32) if wanted is None else wanted
        call = phase.call(ids, np.concatenate(positions), np.concatenate(tables), rows)
        for position in handed_over(phase.phase):
            phase.works[position](call)
        return phase.logits(call).copy()


@contextmanager
def bench(directory: Path, plan: Plan) -> Iterator[Bench]:
    """Both ways to run a checkpoint."""
    assert not [phase for phase in plan.phases if phase.max_tokens > 4096]
    host = compile_plan(directory, max_context=plan.limits.max_context, max_chunk=64, threads=2)
    with ExitStack() as stack:
        jit = Jit(EMITTERS)
        pool = stack.enter_context(Pool(jit, TIERS[plan.isa], 2))
        store = WeightStore.open(plan, directory)
        stack.callback(store.close)
        kv = KVCache(plan.kv, plan.limits.max_context)
        stack.callback(kv.close)
        devices = [FilledGpu(f"gpu{n}") for n in range(len(plan.machine.gpus))]
        parts = Parts(plan, store, kv, jit, pool)
        binding = stack.enter_context(Binding(parts, devices))
        cpu = Executor(host, directory, threads=2)
        stack.callback(cpu.close)
        for device in devices:
            ledger = {i.kind: i.bytes for i in plan.ledger if i.device == device.name}
            counted = sum(i.bytes for i in plan.ledger if i.device == device.name)
            more = device.used - (counted - ledger["scratch"])
            assert abs(more) < 256 * len(device._held), "the ledger counts what is allocated"
        yield Bench(plan, parts, binding, kv, cpu, devices)
    assert not any(device.used for device in devices)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """`compiled(directory, gpus, beside)`: a plan with 0.7 of the routed experts on GPUs, the rest
    on the host, and `beside` bytes of each GPU for streaming; both decode phases are taken.
    """

    def compile_split(
        directory: Path, gpus: int = 1, beside: int = 1 << 30, held: float = 0.7, context: int = 256
    ) -> Plan:
        def budget(needs: Needs, *about: Any) -> Budget:
            found = divide(needs, *about)
            assert found is not None
            room = int(held * needs.experts / gpus)
            usable = [room + found.workspace + beside] * gpus
            usable[0] += found.dense + found.cache
            return replace(found, usable=tuple(usable), experts=(room,) * gpus)

        with monkeypatch.context() as patched:
            patched.setattr("hmc.passes.place.budget.divide", budget)
            patched.setattr("hmc.passes.emit.dual_batch.WORTHWHILE", 0.0)
            return compile_plan(
                directory, machine=machine(gpus), max_context=context, max_chunk=64, threads=2
            )

    return compile_split


def ids_of(length: int, seed: int = 1) -> npt.NDArray[np.int32]:
    return np.array(prompt(length, seed), np.int32)


def host_logits(found: Bench, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Logits of every token of a prompt, by the CPU plan."""
    sequence = found.cpu.open()
    parts = [part.copy() for part in found.cpu.prefill(sequence, ids, every=True)]
    found.cpu.release(sequence)
    return np.concatenate(parts)


def errors(
    got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Relative L2 error of every row."""
    difference = np.linalg.norm(got.astype(np.float64) - expected, axis=1)
    return difference / np.linalg.norm(expected.astype(np.float64), axis=1)


@dataclass
class Errors:
    """Errors of all calls of a test.

    Rounding alone may differ: the median over all tokens is within 1 % (measured: 0.4 to 0.6 %,
    which is as far as either way is from float32 arithmetic). Where a rounding tips the choice of
    an expert a row is further away, and a few percent those that attend to it; so of each call a
    quarter must be within 1 % and half within 5 %.
    """

    found: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
        """Check one call's rows."""
        rows = errors(got, expected)
        assert len(rows) < 4 or np.quantile(rows, 0.25) < 0.01, rows
        assert len(rows) < 4 or np.median(rows) < 0.05, rows
        self.found.append(rows)

    def check(self) -> None:
        """Check all rows together."""
        rows = np.concatenate(self.found)
        assert np.median(rows) < 0.01, rows


CASES = [
    pytest.param("qwen3_moe", "fp8", marks=pytest.mark.slow),
    pytest.param("mixtral", "bf16", marks=pytest.mark.slow),
    ("deepseek_v3", "fp8"),
    pytest.param("qwen3_moe", "int4", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "bf16", marks=pytest.mark.slow),
    pytest.param("mixtral", "fp8", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", "bf16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "quant"), CASES)
def test_every_phase_computes_what_the_cpu_plan_does(
    family: str,
    quant: str,
    checkpoint: Callable[..., Path],
    compiled: Callable[..., Plan],
) -> None:
    directory = checkpoint(family, quant)
    plan = compiled(directory)
    assert {"host", "gpu0"} <= {tier for each in plan.placement for tier in each.tiers}
    assert [phase.name for phase in plan.phases] == [HOST, DECODE, DUAL, STREAM]
    with bench(directory, plan) as found:
        phases = found.binding.phases
        long, short = ids_of(75), ids_of(40, 3)
        expected = {len(ids): host_logits(found, ids) for ids in (long, short)}
        first, second = found.kv.open(), found.kv.open()
        # one prompt in two calls of different phases, then one token at a time
        rows = Errors()
        rows.add(found.run(phases[HOST], [(first, long[:31])]), expected[75][:31])
        kept = np.arange(33 - 16, 33, dtype=np.int32)
        rows.add(found.run(phases[STREAM], [(first, long[31:64])], kept), expected[75][48:64])
        rows.add(found.run(phases[STREAM], [(second, short[:32])], kept[:15]), expected[40][17:32])
        for at in range(8):
            both = [(first, long[64 + at : 65 + at]), (second, short[32 + at : 33 + at])]
            wanted = np.stack((expected[75][64 + at], expected[40][32 + at]))
            rows.add(found.run(phases[DUAL if at % 2 else DECODE], both), wanted)
        for at in range(72, 75):
            got = found.run(phases[DECODE], [(first, long[at : at + 1])])
            rows.add(got, expected[75][at : at + 1])
        rows.check()


RANKS = [
    pytest.param("qwen3_moe", "fp8", marks=pytest.mark.slow),
    pytest.param("mixtral", "bf16", marks=pytest.mark.slow),
    ("deepseek_v3", "fp8"),
]


@pytest.mark.parametrize(("family", "quant"), RANKS)
@pytest.mark.parametrize("evicts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_prompt_shared_by_two_ranks(
    family: str,
    quant: str,
    evicts: bool,
    checkpoint: Callable[..., Path],
    compiled: Callable[..., Plan],
) -> None:
    directory = checkpoint(family, quant)
    little = 1 << 20 if family == "deepseek_v3" else 1 << 18
    plan = compiled(directory, 2, little if evicts else 1 << 30)
    phase = plan.phase(STREAM)
    assert phase.ranks == 2
    assert any(step.op == "load" and not step.weights for step in phase.steps) == evicts
    with bench(directory, plan) as found:
        phases, ids = found.binding.phases, ids_of(87)
        expected = host_logits(found, ids)
        sequence, wanted = found.kv.open(), np.arange(0, dtype=np.int32)
        # calls that no number of pieces divides, the second behind a past, then another phase
        found.run(phases[STREAM], [(sequence, ids[:37])], wanted)
        last = np.arange(45 - 11, 45, dtype=np.int32)
        rows = Errors()
        rows.add(found.run(phases[STREAM], [(sequence, ids[37:82])], last), expected[71:82])
        for at in range(82, 84):
            got = found.run(phases[DECODE], [(sequence, ids[at : at + 1])])
            rows.add(got, expected[at : at + 1])
        # and behind tokens that a phase of one GPU appended
        rows.add(found.run(phases[HOST], [(sequence, ids[84:])]), expected[84:])
        rows.check()
        assert_host_cache(found, sequence, 82)
        with pytest.raises(ExecutionError, match="cannot be shared by 2 GPUs"):
            phases[STREAM].call(ids[:3], ids[:3], ids[:3] * 0, wanted)


def assert_host_cache(found: Bench, sequence: Sequence, tokens: int) -> None:
    """The host's cache holds what gpu0's does of the first tokens, in the layout of its kernels."""
    memory = found.binding.phases[STREAM]
    at = np.arange(tokens)
    slots = found.kv.tables[sequence.row, at // found.kv.block] * found.kv.block
    slots = torch.from_numpy((slots + at % found.kv.block).astype(np.int64))
    heads = {
        s.layer: int(s.attrs.get("kv_heads", 1))
        for s in found.plan.phase(STREAM).steps
        if s.op in ("attention", "mla")
    }
    for layer in found.plan.kv.layers:
        for state in found.plan.kv.states(layer):
            whole = exchange.cached(found.kv, layer, state.name, heads[layer])
            host = whole.transpose(1, 2).flatten(0, 1)
            rows = memory.cache(layer, state.name)[slots]
            assert torch.equal(host[slots].flatten(1), rows)
            assert rows.float().abs().max() > 0


@pytest.mark.slow
def test_a_ring_shorter_than_a_layers_experts(
    checkpoint: Callable[..., Path], compiled: Callable[..., Plan]
) -> None:
    directory = checkpoint("deepseek_v3", "bf16")
    plan = compiled(directory, 1, 2 << 20, held=0.1)
    phase = plan.phase(STREAM)
    away = max(
        sum(
            int(s.attrs["count"])
            for s in phase.steps
            if s.op == "load" and s.layer == layer and "count" in s.attrs
        )
        for layer in (1, 2)
    )
    assert 2 <= phase.ring < away
    with bench(directory, plan) as found:
        ids = ids_of(60)
        expected = host_logits(found, ids)
        rows, wanted = Errors(), np.arange(44, 60, dtype=np.int32)
        stream, host = (found.binding.phases[name] for name in (STREAM, HOST))
        rows.add(found.run(stream, [(found.kv.open(), ids)], wanted), expected[44:])
        # the dense weights are back where the slots were
        rows.add(found.run(host, [(found.kv.open(), ids)]), expected)
        rows.check()


@pytest.mark.parametrize(
    ("family", "gpus"), [("deepseek_v3", 2), pytest.param("qwen3_moe", 1, marks=pytest.mark.slow)]
)
def test_a_short_prompt_loads_the_experts_it_chooses(
    family: str, gpus: int, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint(family, "fp8")
    plan = split_plan(directory, gpus=gpus, held=0.3, slow=True)
    phase = plan.phase(CHOSEN)
    steps = {step.id: step for step in phase.steps}
    loads = [step for step in phase.steps if step.op == "load" and "range" in step.attrs]
    assert all(step.inputs["order"].buffer for step in loads)
    moved: list[int] = []
    real = exchange._move
    monkeypatch.setattr(exchange, "_move", lambda pieces: (moved.append(len(pieces)), real(pieces)))
    with bench(directory, plan) as found:
        bound, ids = found.binding.phases[CHOSEN], ids_of(4)
        wanted = expected = 0
        rows = Errors()
        moved.clear()
        got = found.run(bound, [(found.kv.open(), ids)], np.array([3], np.int32))
        rows.add(got, host_logits(found, ids)[3:])
        rows.check()
        for step in steps.values():
            if step.op == "load" and "range" in step.attrs:
                edges = bound.sorted[step.inputs["order"].buffer].counted
                held = bound.copies_of_experts(step)
                expected += len(held)
                # `sorted` is of the last layer that used the buffer
                if step.layer == plan.kv.layers[-1]:
                    wanted += sum(edges[e] < edges[e + 1] for e in held)
        last = [step.layer == plan.kv.layers[-1] for step in loads]
        assert 0 < wanted < sum(last) * max(int(step.attrs["count"]) for step in loads)
        dense = sum(step.op == "load" for step in phase.steps) - len(loads)
        assert 0 < len(moved) - dense < expected


def test_a_prompt_streamed_by_the_second_gpu_is_decoded_by_the_first(
    checkpoint: Callable[..., Path], compiled: Callable[..., Plan]
) -> None:
    directory = checkpoint("mixtral", "bf16")
    plan = compiled(directory, 2)
    phase = plan.phase(BESIDE)
    assert {"gpu1", "h2d0"} <= {step.resource for step in phase.steps}
    with bench(directory, plan) as found:
        phases, ids, rows = found.binding.phases, ids_of(80), Errors()
        expected = host_logits(found, ids)
        sequence, last = found.kv.open(), np.arange(34, 40, dtype=np.int32)
        for first in (0, 40):  # the second call reads the past of the first
            got = found.run(phases[BESIDE], [(sequence, ids[first : first + 36])], last[:2])
            rows.add(got, expected[[first + 34, first + 35]])
            if not first:
                found.run(phases[DECODE], [(sequence, ids[36:37])])
                rows.add(found.run(phases[HOST], [(sequence, ids[37:40])]), expected[37:40])
        rows.check()


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_greedy_text_is_the_cpu_plans(gpus: int, compiled: Callable[..., Plan]) -> None:
    directory = Path(__file__).parents[2] / "examples" / "tiny-kjv"
    plan = compiled(directory, gpus)
    with bench(directory, plan) as found:
        phases = found.binding.phases
        given = np.array(found_ids(directory), np.int32)
        results = []
        for on_devices in (True, False):
            cpu = found.cpu.open()
            sequence, ids, text = found.kv.open(), given, []
            for number in range(12):
                last = np.array([len(ids) - 1], np.int32)
                if on_devices:
                    name = DECODE if number else STREAM
                    logits = found.run(phases[name], [(sequence, ids)], last)
                elif number:
                    logits = found.cpu.decode([cpu], ids)
                else:
                    logits = [part.copy() for part in found.cpu.prefill(cpu, ids)][-1]
                ids = np.array([int(logits[-1].argmax())], np.int32)
                text.append(int(ids[0]))
            results.append(text)
        assert results[0] == results[1]


def found_ids(directory: Path) -> list[int]:
    ids: list[int] = Text.open(directory).encode("And the king said unto the people, ")
    return ids


def test_what_a_phase_cannot_take_is_refused(
    checkpoint: Callable[..., Path], compiled: Callable[..., Plan]
) -> None:
    directory = checkpoint("mixtral", "bf16")
    plan = compiled(directory)
    with bench(directory, plan) as found:
        phase = found.binding.phases[STREAM]
        many = np.zeros(phase.max_wanted + 1, np.int32)
        ids = ids_of(30)
        with pytest.raises(ExecutionError, match="rows of logits, not 30 and 17"):
            phase.call(ids, np.arange(30, dtype=np.int32), ids * 0, many)
        with pytest.raises(ExecutionError, match="the plan computes on gpu0: no such device"):
            Binding(found.parts, [])
