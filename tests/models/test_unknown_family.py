"""A family that the tree does not have: what is said of it, and how it is read all the same."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import FOLDER

import hmc
from hmc.checkpoint.config import ModelConfig
from hmc.cli import main
from hmc.errors import UnsupportedError, UsageError
from hmc.models import FAMILIES, Limit, load
from hmc.models.unknown import LACKING

EXAMPLE = Path(__file__).parents[2] / "examples" / "family"


def _config(family: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((FOLDER / f"{family}.json").read_text())
    return values | changes


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", {"model_type": "qwen9_moe"}, ["nearest is qwen3_moe", "max_window"]),
        (
            "deepseek_v3",
            {"model_type": "deepseek_v9", "hc_mult": 4, "n_hash_layers": 2},
            ["deepseek_v9", "nearest is deepseek_v3", "hc_mult, n_hash_layers", "--family"],
        ),
        ("kimi_k25", {"model_type": "kimi_x"}, ["kimi_x", "nearest is kimi_k2"]),
        (
            "minimax_m2",
            {"model_type": "minimax_m9", "use_qk_norm": False},
            ["minimax_m9", "nearest is minimax_m2", "use_qk_norm", "False"],
        ),
    ],
)
def test_the_nearest_family_is_named(
    family: str, changes: dict[str, Any], words: list[str]
) -> None:
    config = ModelConfig(Path("config.json"), _config(family, **changes), "")
    with pytest.raises(UnsupportedError) as caught:
        load(config)
    message = str(caught.value)
    assert message.startswith("config.json: ") and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", sorted(LACKING))
def test_a_published_model_that_is_not_computed_is_refused_with_the_reason(name: str) -> None:
    config = ModelConfig(Path("config.json"), _config("deepseek_v32", model_type=name), "")
    with pytest.raises(UnsupportedError) as caught:
        load(config)
    assert str(caught.value).startswith(f"config.json: model_type {name!r} needs ")
    assert LACKING[name] in str(caught.value) and name not in FAMILIES


def test_a_family_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_config("qwen3_moe", model_type="my_own")))
    plan = hmc.compile(path, dummy_weights=True, family="qwen3_moe", max_context=64)
    assert plan.model.family == plan.options.family == "qwen3_moe"
    with pytest.raises(UsageError, match=r"--family nonesuch: not one of .*axk1, "):
        hmc.compile(path, dummy_weights=True, family="nonesuch")


def test_a_longer_context_than_the_family_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_config("qwen3_moe")))
    limit = Limit(64, "known_to: beyond it the model is another one")
    row = replace(FAMILIES["qwen3_moe"], limit=lambda config: limit)
    monkeypatch.setitem(FAMILIES, "qwen3_moe", row)
    assert hmc.compile(path, dummy_weights=True).limits.max_context == 64
    message = r"--max-context 65: .* 64 tokens \(known_to: beyond it"
    with pytest.raises(UsageError, match=message):
        hmc.compile(path, dummy_weights=True, max_context=65)


def test_a_longer_context_makes_another_model(tmp_path: Path) -> None:
    """Without being asked Phi-3.5-MoE has the context of its short factors; asked for more, all of
    it turns by the long ones.
    """
    path, config = tmp_path / "config.json", _config("phimoe")
    path.write_text(json.dumps(config))
    plans = [hmc.compile(path, dummy_weights=True, max_context=most) for most in (0, 1024, 1025)]
    assert [plan.limits.max_context for plan in plans] == [1024, 1024, 1025]
    scaling = config["rope_scaling"]
    powers = [config["rope_theta"] ** (-index / 16) for index in range(16)]
    for plan, factors in zip(plans, ("short_factor", "short_factor", "long_factor"), strict=True):
        found = [power / each for power, each in zip(powers, scaling[factors], strict=True)]
        assert [*plan.constants.values()] == [pytest.approx(found)]
    made = [[each.reason for each in plan.decisions if each.by == "models"] for plan in plans]
    assert made[:2] == [[], []] and "long factors, also where" in made[2][0]
    reasons = [each.reason for each in plans[0].decisions if each.subject == "context length"]
    assert "--max-context asks for that" in reasons[0]
    with pytest.raises(UsageError, match=r"2049: .* 2048 tokens \(max_position_embeddings"):
        hmc.compile(path, dummy_weights=True, max_context=2049)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's package, as pip would have installed it."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    about = tmp_path / "site" / "hmc_capped_moe-1.0.dist-info"
    about.mkdir(parents=True)
    about.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["hmc.families"].items()
    lines = "".join(f"{name} = {target}\n" for name, target in points)
    about.joinpath("entry_points.txt").write_text(f"[hmc.families]\n{lines}")
    monkeypatch.syspath_prepend(about.parent)
    monkeypatch.syspath_prepend(EXAMPLE)


@pytest.mark.usefixtures("installed")
@pytest.mark.slow
def test_an_installed_package_brings_a_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_config("qwen3_moe", model_type="capped_moe", logit_cap=5.0)))
    plan = hmc.compile(path, dummy_weights=True, max_context=64, threads=2)
    assert plan.model.family == "capped_moe"
    with hmc.Engine(plan, dummy_weights=True, threads=2) as engine:
        logits = engine.logits([3, 4, 5])
    assert np.isfinite(logits).all() and np.abs(logits).max() <= 5.0
    with pytest.raises(SystemExit) as stopped:
        main(["models", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert not stopped.value.code
    assert {"axk1", "capped_moe", "qwen3_moe"} <= {row["model_type"] for row in rows}
