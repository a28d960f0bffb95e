"""Recorded routing: every choice is counted once, in one of two parts, and the file is the one that
placements learn from; without a recorder no program is cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bench import _CONFIG

from hmc.cli import main
from hmc.compiler import compile as compile_plan
from hmc.errors import UsageError
from hmc.plan import load_plan, save_plan
from hmc.plan.routing_profile import load_profile
from hmc.runtime.engine import Engine
from hmc.runtime.routing import RoutingRecorder

EXPERTS, TOP_K, LAYERS = 16, 4, 3


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing")
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    path = folder / "plan.hmp"
    save_plan(
        compile_plan(folder / "config.json", dummy_weights=True, max_chunk=16, threads=2), path
    )
    return path


@given(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_choice_lands_in_one_part(texts: list[list[int]]) -> None:
    random, recorder = np.random.default_rng(0), RoutingRecorder()
    total = {layer: np.zeros(EXPERTS, np.int64) for layer in (3, 5)}
    by_text = []
    for text in texts:
        recorder.begin()
        by_text.append(sum(text))
        for tokens in text:
            for layer, counts in total.items():
                chosen = random.permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1)
                chosen = chosen[:, :TOP_K].astype(np.int32)
                recorder.count(layer, EXPERTS, chosen)
                counts += np.bincount(chosen.reshape(-1), minlength=EXPERTS)
    if sum(by_text) == 1:
        with pytest.raises(UsageError, match="two tokens"):
            recorder.as_json()
        return
    found = recorder.as_json()
    learn, held_out = found["learn"], found["held_out"]
    for part in (learn, held_out):
        for counts in part["counts"].values():
            assert sum(counts) == TOP_K * part["tokens"]
    for layer, counts in total.items():
        both = np.add(learn["counts"][str(layer)], held_out["counts"][str(layer)])
        np.testing.assert_array_equal(both, counts)
    if len(texts) > 1:
        assert learn["tokens"] == sum(by_text[::2])
    else:
        assert abs(learn["tokens"] - held_out["tokens"]) <= 1 + by_text[0] // 16


def test_halves_of_one_text_are_in_order() -> None:
    recorder = RoutingRecorder()
    recorder.begin()
    recorder.count(0, 4, np.zeros((100, 1), np.int32))
    recorder.count(0, 4, np.full((100, 1), 2, np.int32))
    found = recorder.as_json()
    assert found["learn"] == {"tokens": 100, "counts": {"0": [100, 0, 0, 0]}}
    assert found["held_out"] == {"tokens": 100, "counts": {"0": [0, 0, 100, 0]}}


def test_nothing_recorded_is_an_error() -> None:
    with pytest.raises(UsageError, match="two tokens"):
        RoutingRecorder().as_json()


@pytest.mark.slow
def test_tokens_do_not_change(plan_file: Path) -> None:
    plan, recorder = load_plan(plan_file), RoutingRecorder()
    with Engine(plan, threads=2, dummy_weights=True) as plain:
        expected = plain.generate([1, 2, 3, 4, 5], max_new_tokens=6)
    with Engine(plan, threads=2, dummy_weights=True, routing=recorder) as engine:
        recorder.begin()
        assert engine.generate([1, 2, 3, 4, 5], max_new_tokens=6).token_ids == expected.token_ids
    found = recorder.as_json()
    done = 5 + len(expected.token_ids) - 1  # the last token is not fed back
    assert found["learn"]["tokens"] + found["held_out"]["tokens"] == done


@pytest.mark.slow
def test_the_command_writes_what_compile_reads(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, target = tmp_path / "prompts.jsonl", tmp_path / "routing.json"
    lines = [{"ids": list(range(1, 20))}, {"ids": [7, 8]}, {"ids": [9, 10, 11]}]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["run", plan_file, "--dummy-weights", "--prompts", prompts, "-n", 1]
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments), "--record-routing", str(target)])
    _, err = capsys.readouterr()
    assert not stopped.value.code, err
    assert "predict" not in err  # counting slows down: there is nothing to compare
    profile = load_profile(target)
    profile.check(dict.fromkeys(range(LAYERS), EXPERTS))
    assert (profile.learn.tokens, profile.held_out.tokens) == (19 + 3, 2)
    for part in (profile.learn, profile.held_out):
        assert sorted(part.counts) == list(range(LAYERS))
        for layer in range(LAYERS):
            assert sum(part.probabilities(layer, EXPERTS)) == pytest.approx(TOP_K)
