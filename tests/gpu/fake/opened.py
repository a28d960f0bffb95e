"""Executors for the checks: the bundled model whole, and published models in their true shapes, a
few layers of them and no weights' values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
from split_plans import split_plan

from gpu.fake import log
from gpu.fake.machine import here
from gpu.models import CONFIGS
from hmc.compiler import compile as compile_plan
from hmc.machine.detect import load_machine
from hmc.plan import Plan
from hmc.runtime.executor import Executor
from hmc.runtime.schedule.host_program import HostProgram
from hmc.runtime.weights.store import Home, WeightStore

TINY = CONFIGS.parent / "tiny-kjv"
_NAMED = "epyc9355-rtx5090"
_CONTEXT = 32768
_MOST = 32 << 30
"""Of a GPU's memory is used, so that something is left to stream."""
_ENOUGH = 1 << 42
_LARGE = 1 << 20
"""Copies of more bytes are of weights, which have no values."""


@contextmanager
def tiny(home: Home) -> Iterator[Executor]:
    """The bundled model on the GPUs that there are, half of its experts on them."""
    plan = split_plan(TINY, gpus=here().gpus, switches=True)
    executor = Executor(plan, TINY, home=home, devices="cuda")
    yield executor  # closed with the process: what it waits for may have gone wrong


@contextmanager
def shaped(model: str, layers: int) -> Iterator[Executor]:
    """A model of examples/configs with so many layers, compiled for GPUs as large as there are."""
    log.copy_at_most(_LARGE)
    plan = _plan(model, layers)
    with (
        mock.patch("hmc.runtime.weights.store.fill_dummy"),
        mock.patch("hmc.runtime.weights.store.available_bytes", return_value=_ENOUGH),
    ):
        store = WeightStore.open(plan, None, dummy=True)
    yield Executor(plan, None, store=store, devices="cuda", threads=2)


def _plan(model: str, layers: int) -> Plan:
    values: dict[str, Any] = json.loads((CONFIGS / model / "config.json").read_text())
    values["num_hidden_layers"] = layers
    if "first_k_dense_replace" in values:
        values["first_k_dense_replace"] = 1
    machine = load_machine(_NAMED)
    update = {"memory_bytes": here().gb << 30}
    gpus = tuple(gpu.model_copy(update=update) for gpu in machine.gpus)
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return compile_plan(
            Path(folder),
            machine=machine.model_copy(update={"gpus": gpus}),
            dummy_weights=True,
            max_context=_CONTEXT,
            vram=min(here().gb << 30, _MOST) / 1e9,
        )


def prompt(executor: Executor, tokens: int, phase: str) -> None:
    """Compute a prompt, and give its cache back."""
    sequence = executor.open()
    for _ in executor.prefill(sequence, ids(tokens), phase=phase):
        pass
    executor.release(sequence)


def ids(tokens: int) -> Any:
    """Tokens of a prompt."""
    return np.arange(2, 2 + tokens, dtype=np.int32) % 1000


def without_cpu() -> None:
    """Decode without the CPU's part from here on: its programs set flags and compute nothing."""

    def run(self: HostProgram, call: object, *, timed: bool = False) -> None:
        for number in range(self.flags.count):
            self.flags.set(number, self.flags.epoch)

    HostProgram.run = run  # type: ignore[method-assign]
