"""Commands that take a model where a plan is wanted: compiled into the cache, taken from there,
compiled again when it is stale.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hmc.cli.planned import planned
from hmc.errors import PlanFormatError, UsageError

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-kjv"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HMC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLE, tmp_path / "tiny"))


def test_a_model_is_compiled_once(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = planned(str(model))
    said = capsys.readouterr().err
    (kept,) = cache.iterdir()
    assert said.startswith(f"[compiled {model} in ") and str(kept) in said
    assert (first.name, first.path, first.checkpoint) == ("tiny", str(kept), None)
    monkeypatch.chdir(model.parent)
    second = planned("tiny")
    assert second == first
    assert capsys.readouterr().err == f"[plan of an earlier run: {kept}]\n"


def test_other_options_and_machines_have_plans_of_their_own(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(str(model))
    assert planned(str(model), dummy_weights=True).plan.checkpoint.dummy
    monkeypatch.setenv("HMC_ISA", "avx2")
    assert planned(str(model)).plan.isa == "avx2"
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("dummy_weights", [False, True])
def test_a_stale_plan_is_compiled_again(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str], dummy_weights: bool
) -> None:
    before = planned(str(model), dummy_weights=dummy_weights).plan
    config = model / "config.json"
    config.write_text(config.read_text() + " ")
    capsys.readouterr()
    after = planned(str(model), dummy_weights=dummy_weights).plan
    assert after.checkpoint.config_sha256 != before.checkpoint.config_sha256
    said = capsys.readouterr().err
    assert "does not hold" in said and "config.json" in said and "[compiled" in said
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_plan_is_compiled_again(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = planned(str(model))
    Path(first.path).write_bytes(b"no plan")
    capsys.readouterr()
    assert planned(str(model)) == first
    assert "does not hold" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_said(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way")
    found = planned(str(model))
    assert found.path == "" and found.plan.model.layers == 5
    assert "[plan not kept: " in capsys.readouterr().err


def test_what_is_no_model_is_a_plan(model: Path, tmp_path: Path) -> None:
    found = planned(planned(str(model)).path, "elsewhere")
    assert found.checkpoint == "elsewhere"
    with pytest.raises(PlanFormatError, match="no hmc plan"):
        planned(str(model / "config.json"))
    with pytest.raises(UsageError, match="--checkpoint"):
        planned(str(model), "elsewhere")
