"""What a conversation keeps in the cache: only what is new is computed, with the logits that a
prompt computed from its beginning has, however one prompt follows another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import hmc
from hmc.runtime.tokens.kept import Kept

BLOCK = 64


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[..., Path]) -> Iterator[hmc.Engine]:
    plan = hmc.compile(checkpoint("qwen3_moe", "fp8"), max_context=512)
    assert plan.kv.block == BLOCK
    with hmc.Engine(plan) as engine:
        yield engine
        assert engine.executor.kv.allocator.used == 0


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


def computed(engine: hmc.Engine, kept: Kept, ids: list[int]) -> int:
    """Tokens of a prompt that are computed, whose logits must be those without a cache."""
    whole = engine.logits(ids)[-1]
    with kept.holding(np.array(ids, np.int32), []) as sequence:
        there = sequence.length
        logits = whole[None]
        for each in engine.executor.prefill(sequence, np.array(ids[there:], np.int32)):
            kept.grown(sequence, np.array(ids, np.int32))
            logits = each
        error = np.linalg.norm(logits[0] - whole) / np.linalg.norm(whole)
    assert error < 0.03, (there, error)
    assert kept.tokens == len(ids)
    return len(ids) - there


def test_turns_compute_what_is_new(engine: hmc.Engine) -> None:
    with Kept(engine.executor) as kept:
        ids = ids_of(100)
        for turn in range(3):
            stream = engine.stream(ids, kept=kept, max_new_tokens=40, temperature=0)
            said = [piece.token_ids[0] for piece in stream]
            assert stream.cached_tokens == (0 if turn == 0 else len(ids) - 8)
            assert kept.tokens == len(ids) + len(said) - 1
            ids = [*ids, *said, *ids_of(7, turn)]
        assert computed(engine, kept, ids) == 8


@pytest.mark.parametrize("alike", [0, 10, BLOCK, BLOCK + 30, 2 * BLOCK + 5, 149])
def test_a_prompt_that_differs_somewhere_is_computed_from_there(
    engine: hmc.Engine, alike: int
) -> None:
    first, other = ids_of(150), ids_of(40, 9)
    with Kept(engine.executor) as kept:
        assert computed(engine, kept, first) <= 150
        there = alike if alike >= 2 * BLOCK else alike // BLOCK * BLOCK  # blocks others may find
        assert computed(engine, kept, first[:alike] + other) == alike + 40 - there
        computed(engine, kept, first)  # what others may find of it is still right
        assert computed(engine, kept, first) == 1


def test_what_a_cancelled_answer_said_stays(engine: hmc.Engine) -> None:
    ids = ids_of(90, 3)
    with Kept(engine.executor) as kept:
        stream = engine.stream(ids, kept=kept, max_new_tokens=30, temperature=0)
        said = [next(stream).token_ids[0] for _ in range(5)]
        stream.cancel()
        assert list(stream) == [] and stream.result.finish_reason == "cancelled"
        assert computed(engine, kept, [*ids, *said, 7]) == 2
        closed = engine.stream([*ids, *said, 7], kept=kept, max_new_tokens=30)
        next(closed)
        closed.close()
        assert kept.tokens == 96
        early = engine.stream(ids_of(300, 4), kept=kept, max_new_tokens=5)
        early.cancel()
        assert list(early) == [] and early.result.token_ids == ()


def test_nothing_is_kept_after_an_error(
    engine: hmc.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(20, 5)
    with Kept(engine.executor) as kept:
        computed(engine, kept, ids)

        def breaks(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(engine.executor, "decode", breaks)
        assert len(list(engine.stream(ids, kept=kept, max_new_tokens=5))) == 1
        assert kept.tokens == 0 and engine.executor.kv.allocator.used == 0
