"""Decode with the GPUs' segments as graphs, played by the host: tokens are those without, nothing
that a graph does depends on a new call but through tensors that stay where they are, and nothing in
it looks at values on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import prompt
from played import executor
from split_plans import DUAL, split_plan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmc.cli.arguments import telling
from hmc.errors import ExecutionError, MachineError, UsageError
from hmc.plan import Operand, Step
from hmc.runtime.binding.phase import BoundPhase
from hmc.runtime.device_ops import DEVICE_OPS
from hmc.runtime.device_ops.matmul import Matrix
from hmc.runtime.device_ops.shares import Call, Fixed, Rows
from hmc.runtime.devices.base import Work
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.devices.worker import Worker
from hmc.runtime.executor import Executor
from hmc.runtime.phases import decode_graphs
from hmc.runtime.phases.decode_graphs import DecodeGraphs, bucket
from hmc.runtime.phases.phase import DevicePhase
from hmc.runtime.routing import RoutingRecorder
from hmc.runtime.schedule.crossing import crossing
from hmc.runtime.schedule.runner import ScheduleRunner
from hmc.runtime.schedule.segments import segments

Checkpoint = Callable[..., Path]
Floats = npt.NDArray[np.float32]

FAMILIES = [
    ("qwen3_moe", "fp8"),
    pytest.param("deepseek_v3", "bf16", marks=pytest.mark.slow),
]
LENGTHS = (5, 11, 8, 14)
STEPS = 6


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMC_GRAPHS", "1")
    monkeypatch.setattr(decode_graphs, "LEAST_BUCKET", 8)
    monkeypatch.setattr(decode_graphs, "FIRST", 1)


def phase_of(found: Executor, name: str = "decode") -> DevicePhase:
    phase = found.phases[name]
    assert isinstance(phase, DevicePhase)
    return phase


def graphs_of(found: Executor, name: str = "decode") -> DecodeGraphs:
    graphs = phase_of(found, name).graphs
    assert graphs is not None
    return graphs


def answers(found: Executor, batch: int, steps: int = STEPS, phase: str = "decode") -> Floats:
    """Logits [steps, batch, vocab] of sequences that go on greedily."""
    sequences = [found.open() for _ in range(batch)]
    last = []
    for number, sequence in enumerate(sequences):
        ids = np.array(prompt(LENGTHS[number], number), np.int32)
        *_, logits = found.prefill(sequence, ids)
        last.append(logits[-1].argmax())
    seen = []
    for _ in range(steps):
        seen.append(found.decode(sequences, np.array(last, np.int32), phase).copy())
        last = list(seen[-1].argmax(1))
    for sequence in sequences:
        found.release(sequence)
    return np.stack(seen)


@pytest.mark.parametrize(("family", "quant"), FAMILIES)
@pytest.mark.parametrize("meet", ["flags", pytest.param("events", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("graphs")
@pytest.mark.slow
def test_greedy_tokens_are_those_without_graphs(
    family: str, quant: str, meet: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: HostBackend, count: int) -> Flags:
        raise MachineError("no stream can wait for memory")

    if meet == "events":
        monkeypatch.setattr(HostBackend, "flags", refuse)
    directory = checkpoint(family, quant)
    with executor(split_plan(directory, held=0.4), directory, delays=1) as found:
        phase = phase_of(found)
        assert (phase.program is None) == (meet == "events")
        for name, batches in (("decode", (1, 2, 4)), (DUAL, (4,))):
            for batch in batches:
                kept = graphs_of(found, name)
                before = kept.replayed
                mine = answers(found, batch, phase=name)
                # a bucket's edge is crossed, and the first call of each key goes step by step
                keys = {bucket(max(LENGTHS[:batch]) + step + 1, 256) for step in range(STEPS)}
                assert len(keys) == 2
                assert kept.replayed - before == STEPS - 2
                phase_of(found, name).graphs = None
                expected = answers(found, batch, phase=name)
                phase_of(found, name).graphs = kept
                assert np.array_equal(mine.argmax(-1), expected.argmax(-1))
                off = np.linalg.norm(mine - expected, axis=-1)
                assert (off < 0.02 * np.linalg.norm(expected, axis=-1)).all()


@pytest.mark.parametrize(("family", "quant"), FAMILIES)
def test_a_graph_gives_the_bits_of_single_steps(
    family: str, quant: str, checkpoint: Checkpoint
) -> None:
    directory = checkpoint(family, quant)
    with executor(split_plan(directory, held=0.4), directory) as found:
        for name in ("decode", DUAL):
            bound = phase_of(found, name).bound
            sequences = [found.open() for _ in range(3)]
            for number, sequence in enumerate(sequences):
                list(found.prefill(sequence, np.array(prompt(5 + 3 * number, number), np.int32)))
                found.kv.reserve(sequence, 20)
            rows = np.array([sequence.row for sequence in sequences], np.int32)
            wanted = np.arange(3, dtype=np.int32)
            backend = HostBackend(1, 1 << 30, delays=7)
            across = crossing(bound.phase)
            assert across is not None
            for program in (None, bound.program(across, backend.flags(len(across.flags)))):
                runner = ScheduleRunner(bound.phase, backend, bound.works, program=program)
                fixed, orders = Fixed(32), None
                for step in range(4):
                    ids = np.array(prompt(3, 40 + step), np.int32)
                    positions = 5 + 3 * wanted + step
                    call = bound.call(ids, positions.astype(np.int32), rows, wanted, fixed)
                    runner.run_untimed(call)
                    expected = bound.logits(call).copy()
                    # the first call's: later ones are known by the tensors alone
                    orders = orders or runner.graphs(call)
                    bound.logits(call)[:] = np.nan
                    runner.run_untimed(call, orders)
                    assert np.array_equal(bound.logits(call), expected), f"{name}, step {step}"
            backend.close()
            for sequence in sequences:
                found.release(sequence)


def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of what streams are asked to make graphs of."""
    labels = []
    make = Worker.graph

    def noted(self: Worker, works: Sequence[Work], label: str) -> Work:
        labels.append(label)
        return make(self, works, label)

    monkeypatch.setattr(Worker, "graph", noted)
    return labels


@pytest.mark.usefixtures("graphs")
def test_the_graphs_of_the_latest_keys_are_kept(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "KEPT", 2)
    labels = captures(monkeypatch)
    directory = checkpoint("mixtral", "bf16", layers=2)
    with executor(split_plan(directory), directory) as found:
        kept = graphs_of(found)
        count = len(segments(phase_of(found).bound.phase))
        assert f"decode: {count} runs of GPU steps handed over as graphs" in found.handover
        made = []
        for batch in (1, 2, 1, 3, 1, 2):  # 2 is evicted by 3
            answers(found, batch, 2)
            made.append(len(labels) // count)
        assert made == [1, 2, 2, 3, 3, 4]
        assert len(labels) == 4 * count
        # once for each that was made, and both of the steps where it was there already
        assert kept.replayed == 4 * 1 + 2 * 2


@pytest.mark.usefixtures("graphs")
def test_where_a_device_refuses_decoding_goes_on_step_by_step(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = checkpoint("mixtral", "bf16", layers=2)
    plan = split_plan(directory)
    with executor(plan, directory) as found, telling(found):
        expected = answers(found, 2)
    assert capsys.readouterr().err.count("\n") == 1

    def refuse(self: Worker, works: Sequence[Work], label: str) -> Work:
        raise ExecutionError(f"{label} cannot be captured on {self.name}: no")

    monkeypatch.setattr(Worker, "graph", refuse)
    with executor(plan, directory) as found:
        with telling(found):
            assert np.array_equal(answers(found, 2).argmax(-1), expected.argmax(-1))
        assert graphs_of(found).replayed == 0
        assert "decode: GPU steps are handed over one by one: phase decode, s" in found.handover
        first, later = capsys.readouterr().err.splitlines()
        assert "one by one" not in first
        assert "cannot be captured on gpu0: no" in later


def test_who_goes_step_by_step(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoint("mixtral", "bf16", layers=2)
    plan = split_plan(directory)
    with executor(plan, directory) as found:  # played GPUs, unless asked to
        assert phase_of(found).graphs is None
    monkeypatch.setenv("HMC_GRAPHS", "1")
    with executor(plan, directory, routing=RoutingRecorder()) as found:
        assert phase_of(found).graphs is None
    with executor(plan, directory) as found:
        with found.recorded():
            answers(found, 1)
        answers(found, 1, 2)  # the first calls of a key
        answers(found, 1, 3, DUAL)  # a lane would have nothing to do
        list(found.prefill(found.open(), np.array(prompt(3, 1), np.int32), phase="decode"))
        assert graphs_of(found).replayed == graphs_of(found, DUAL).replayed == 0
    monkeypatch.setenv("HMC_GRAPHS", "2")
    with pytest.raises(UsageError, match="HMC_GRAPHS=2"):
        Executor(plan, directory, threads=2, devices="host")


def test_buckets() -> None:
    assert [bucket(n, 1000) for n in (1, 256, 257, 512, 513, 1000)] == [
        256,
        256,
        512,
        512,
        1000,
        1000,
    ]
    assert bucket(3, 64) == 64


# -- what a capture refuses ------------------------------------------------------------------------


class Capturing(TorchDispatchMode):
    """Refuses tensors on the host: a capture cannot wait for a copy, and a graph would read memory
    of old. Questions about values are refused by tensors on "meta", which have none.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, found)):
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                raise RuntimeError(f"{func} is at work on the host")
        return found


class WithoutValues:
    """A bound phase on a device where tensors have no values."""

    def __init__(self, bound: BoundPhase) -> None:
        self._bound = bound

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bound, name)

    def tensor(self, operand: Operand) -> torch.Tensor:
        return faked(self._bound.tensor(operand))

    def matrix(self, step: Step, role: str) -> Matrix:
        found = self._bound.matrix(step, role)
        return replace(found, planes=tuple(faked(plane) for plane in found.planes))

    def vector(self, step: Step, role: str) -> torch.Tensor | None:
        found = self._bound.vector(step, role)
        return None if found is None else faked(found)

    def cache(self, layer: int, part: int) -> torch.Tensor:
        return faked(self._bound.cache(layer, part))

    def experts(self, step: Step) -> Any:
        return {}

    def call(self, call: Call) -> Call:
        """A call with tensors that have no values either."""
        rows = {key: replace(found, **_tensors(found)) for key, found in call.rows.items()}
        picked = {device: faked(tensor) for device, tensor in call.picked.items()}
        return replace(call, rows=rows, picked=picked, **_tensors(call))


def faked(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _tensors(owner: Rows | Call) -> dict[str, Any]:
    return {k: faked(v) for k, v in vars(owner).items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("quant", ["bf16", "fp8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_segments_do_nothing_that_a_capture_refuses(
    family: str, quant: str, checkpoint: Checkpoint
) -> None:
    directory = checkpoint(family, quant)
    refused = set()
    with executor(split_plan(directory, held=0.4), directory) as found:
        for name in ("decode", DUAL):
            bound = phase_of(found, name).bound
            inside = {at for run in segments(bound.phase) for at in run}
            sequences = [found.open() for _ in range(3)]
            for sequence in sequences:
                found.kv.reserve(sequence, 20)
            rows = np.array([sequence.row for sequence in sequences], np.int32)
            real = bound.call(rows, 3 * rows, rows, rows, Fixed(32))
            fake = WithoutValues(bound)
            call = fake.call(real)
            for at, step in enumerate(bound.phase.steps):
                if not step.resource.startswith("gpu"):
                    continue
                work = DEVICE_OPS[step.op](fake, step)
                with Capturing():
                    if at in inside:
                        work(call)
                        continue
                    try:
                        work(call)
                    except (NotImplementedError, RuntimeError):  # asked for values: asserted below
                        refused.add(step.op)
            for sequence in sequences:
                found.release(sequence)
    assert "experts" in refused  # asks how many rows each has: the check sees that
