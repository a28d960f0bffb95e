"""Every family whose layers keep a state of fixed size a sequence, by its tiny model: prompts in
chunks of any length, decode after them, and snapshots.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from parity import errors
from reference import load_model, run
from tiny_models import FOLDER, Floats, keeping_states, prompt, write

import hmc
from hmc.runtime.executor import Executor, Sequence

BLOCK, NEW = 64, 8
CHUNKS = (1, 7, 64, 512)
LONG = 2 * BLOCK + 13
QUICK = "qwen3_5_moe"
"""The family of which `make test` runs it."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(each, marks=[] if each == QUICK else pytest.mark.slow)
        for each in keeping_states()
    ],
)
def directory(request: pytest.FixtureRequest, written: Callable[..., Path]) -> Path:
    """Of a family with an indexer, which chooses more than half of most contexts here: near ties of
    it are seen less. It chooses few in test_glm5_next.py.
    """
    name = request.param
    values = json.loads((FOLDER / f"{name}.json").read_text())
    changes = {"index_topk": 256} if "index_topk" in values.get("text_config", values) else {}
    return written(f"states-{name}", lambda found: write(found, name, **changes))


@pytest.fixture(scope="module")
def executor(directory: Path) -> Iterator[Executor]:
    plan = hmc.compile(directory, max_chunk=max(CHUNKS), max_context=640, threads=2)
    with hmc.Engine(plan) as engine:
        yield engine.executor


def _chunks(executor: Executor, sequence: Sequence, ids: list[int], size: int) -> Floats:
    """Logits of all tokens, appended in chunks of a size."""
    found = []
    for first in range(0, len(ids), size):
        part = np.array(ids[first : first + size], np.int32)
        found.append(executor.append(sequence, part, np.arange(len(part), dtype=np.int32)).copy())
    return np.concatenate(found)


@pytest.mark.parametrize("length", [LONG, pytest.param(600, marks=pytest.mark.slow)])
def test_chunks_of_any_length_and_decode(executor: Executor, directory: Path, length: int) -> None:
    """They give what the blocks give, but for tokens of which a router goes another way. A row is
    used again by each: it begins with zeros.
    """
    ids = prompt(length + NEW)
    exact = run(load_model(directory).module, ids).numpy()
    answers = []
    for size in CHUNKS:
        sequence = executor.open()
        rows = [_chunks(executor, sequence, ids[:length], size)]
        for token in ids[length:]:
            rows.append(executor.decode([sequence], np.array([token], np.int32)).copy())
        executor.release(sequence)
        answers.append(np.concatenate(rows))
        found = errors(answers[-1], exact)
        assert np.median(found) < 0.03 and (found > 0.05).mean() < 0.35, size
        assert np.quantile(found[length:], 0.25) < 0.03, size
        assert np.median(errors(answers[-1], answers[0])) < 0.005, size


def test_a_snapshot_continues_token_for_token(executor: Executor) -> None:
    """A prompt that begins as another did goes on from its states at the end of a block."""
    ids, answers, logits = prompt(LONG), [], []
    for cached in (0, 2 * BLOCK):
        sequence, rows = executor.open(), []
        assert executor.kv.adopt(sequence, np.array(ids, np.int32)) == cached
        while sequence.length < len(ids):
            rows = [_chunks(executor, sequence, ids[sequence.length :][:BLOCK], BLOCK)[-1:]]
            executor.kv.keep(sequence, np.array(ids, np.int32))
        for _ in range(NEW):
            token = np.array([rows[-1].argmax()], np.int32)
            rows.append(executor.decode([sequence], token).copy())
        executor.release(sequence)
        answers.append([int(row.argmax()) for row in rows])
        logits.append(np.concatenate(rows))
    assert answers[0] == answers[1]
    assert np.array_equal(*logits)
