"""Decode with the GPUs' segments as graphs, played by the host: tokens are those without, nothing
that a graph does depends on a new call but through tensors that stay where they are, and nothing in
it looks at values on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import prompt
from split_plans import DUAL, split_plan
from torch.utils._python_dispatch import TorchDispatchMode

from hmc.errors import ExecutionError, MachineError, UsageError
from hmc.plan import Plan
from hmc.runtime import decode_graphs
from hmc.runtime.decode_graphs import DecodeGraphs, bucket
from hmc.runtime.device_ops.base import Work
from hmc.runtime.device_phase import DevicePhase
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.devices.worker import Worker
from hmc.runtime.executor import Executor
from hmc.runtime.routing import RoutingRecorder
from hmc.runtime.segments import segments
from hmc.runtime.shares import Fixed

Checkpoint = Callable[..., Path]
Floats = npt.NDArray[np.float32]

FAMILIES = [("qwen3_moe", "fp8"), ("deepseek_v3", "bf16")]
LENGTHS = (5, 11, 8, 14)
STEPS = 6


@contextmanager
def executor(plan: Plan, directory: Path, **options: Any) -> Iterator[Executor]:
    found = Executor(plan, directory, **{"threads": 2, "devices": "host", **options})
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMC_GRAPHS", "1")
    monkeypatch.setattr(decode_graphs, "LEAST_BUCKET", 8)


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
@pytest.mark.parametrize("meet", ["flags", "events"])
@pytest.mark.usefixtures("graphs")
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
                keys = {
                    bucket(max(LENGTHS[:batch]) + step + 1, 256) for step in range(STEPS)
                }
                assert len(keys) == 2
                assert kept.replayed - before == STEPS - 2
                phase_of(found, name).graphs = None
                expected = answers(found, batch, phase=name)
                phase_of(found, name).graphs = kept
                assert np.array_equal(mine.argmax(-1), expected.argmax(-1))
                off = np.linalg.norm(mine - expected, axis=-1)
                assert (off < 0.02 * np.linalg.norm(expected, axis=-1)).all()
