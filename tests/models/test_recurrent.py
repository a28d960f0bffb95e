"""Families whose layers keep states a sequence, by their tiny models: chunks of a prompt of any
length, decode after them, and prompts that go on from a snapshot give what the whole prompt gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import errors
from safetensors.torch import load_file, save_file
from tiny_models import Floats, families, prompt

import hmc
from hmc.runtime.executor import Executor
from hmc.runtime.host.tables import Tables
from hmc.runtime.weights.store import WeightStore
from hmc.runtime.weights.tensors import array_at

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
OPS = re.compile(r": (conv|linear_attention|selective_scan) ")
RECURRENT = [name for name in families() if OPS.search((GOLDEN / f"{name}.txt").read_text())]
BLOCK, LENGTH = 64, 150
CLOSE = 0.01
"""The median over tokens of the relative error: kernels round alike, but for near ties of routers
and the order of what attention sums."""


@pytest.fixture(scope="module", params=RECURRENT)
def engine(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Iterator[hmc.Engine]:
    plan = hmc.compile(tiny(request.param), max_chunk=512, max_context=320, threads=2)
    with hmc.Engine(plan, threads=2) as found:
        yield found


def chunked(executor: Executor, ids: list[int], size: int) -> Floats:
    """Logits of every token, of a prompt in chunks."""
    sequence, rows = executor.open(), []
    for start in range(0, len(ids), size):
        part = np.array(ids[start : start + size], np.int32)
        every = np.arange(len(part), dtype=np.int32)
        rows.append(executor.append(sequence, part, every).copy())
    executor.release(sequence)
    return np.concatenate(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_several_dimensions_are_vectors(
    dtype: torch.dtype, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """In place where they are stored in F32."""
    source, names = tiny("jamba"), [f"model.layers.0.mamba.{end}" for end in ("A_log", "conv1d")]
    names[1] += ".weight"
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: tensors[name].to(dtype) for name in names}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").symlink_to(source / "config.json")
    plan = hmc.compile(tmp_path)
    store = WeightStore.open(plan, tmp_path)
    tables = Tables(plan, store)
    for name in names:
        wanted, place = tensors[name].float(), tables.vector(name)
        assert (place == store.address(name)) == (dtype == torch.float32)
        assert np.array_equal(floats(place, wanted.numel()), wanted.flatten())
        turned = wanted.reshape(len(wanted), -1).T
        assert np.array_equal(
            floats(tables.by_column(name, len(wanted)), wanted.numel()), turned.flatten()
        )
    store.close()


def floats(address: int, count: int) -> Floats:
    """What lies at an address."""
    return array_at(address, np.dtype(np.float32), (count,))


@pytest.mark.slow
def test_chunks_of_any_length(engine: hmc.Engine) -> None:
    ids = prompt(LENGTH)
    whole = chunked(engine.executor, ids, 512)
    for size in (1, 7, 64):
        assert np.median(errors(chunked(engine.executor, ids, size), whole)) < CLOSE, size


@pytest.mark.slow
def test_decode_goes_on_after_a_prompt(engine: hmc.Engine) -> None:
    ids, executor = prompt(LENGTH), engine.executor
    whole = chunked(executor, ids, 512)
    sequence = executor.open()
    executor.append(sequence, np.array(ids[:-20], np.int32), np.zeros(0, np.int32))
    rows = [executor.decode([sequence], np.array([each], np.int32)).copy() for each in ids[-20:]]
    executor.release(sequence)
    assert np.median(errors(np.concatenate(rows), whole[-20:])) < CLOSE


@pytest.mark.slow
def test_a_prompt_goes_on_from_a_snapshot(engine: hmc.Engine) -> None:
    """The same bits as the same chunks without one."""
    executor, ids = engine.executor, np.array(prompt(LENGTH), np.int32)
    found = []
    for cached in (0, 2 * BLOCK):
        sequence = executor.open()
        assert executor.kv.adopt(sequence, ids) == cached
        while sequence.length < len(ids):
            part = ids[sequence.length : sequence.length + BLOCK]
            last = np.array([len(part) - 1], np.int32)
            logits = executor.append(sequence, part, last).copy()
            executor.kv.keep(sequence, ids)
        found.append(logits)
        executor.release(sequence)
    assert np.array_equal(*found)
    assert executor.kv.allocator.used == 0
