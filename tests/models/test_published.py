"""Configurations of published models (published/, see SOURCES.md there) compile for a CPU and for a
server with a GPU, and give the numbers of parameters that their publishers state. Machines are
named: nothing depends on the one that tests run on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import pytest

import hmc
from hmc.checkpoint.config import load_config
from hmc.models import FAMILIES, load
from hmc.models.measured import markdown

FOLDER = Path(__file__).parent / "published"
MACHINES = ("laptop", "epyc9355-rtx5090")
FEW = 8
"""The first layers of every configuration that are of all its kinds."""

Counted = Literal["all", "head", "neither"]


class Stated(NamedTuple):
    """Billions of parameters as the publisher says them, and whether those `active` for a token
    count both the embedding table and the output layer, the latter alone, or neither; "" where the
    publisher's number of active ones counts what hmc does not read. `aside` are billions of what
    hmc leaves aside, where they are more than a hundredth of the total.
    """

    total: str
    active: str
    counted: Counted = "all"
    aside: float = 0.0


STATED = {
    "a.x-k1": Stated("519", "33"),
    "command-a-plus": Stated("218", "25", "head"),
    "deepseek-r1": Stated("671", "37"),
    "deepseek-v2": Stated("236", "21"),
    "deepseek-v2-lite": Stated("15.7", "2.4", "head"),
    "deepseek-v3": Stated("671", "37"),
    "deepseek-v3.1": Stated("671", "37"),
    "deepseek-v3.2": Stated("671", "37", "head"),
    "deepseek-v4-flash": Stated("284", "13", "head"),
    "deepseek-v4-pro": Stated("1600", "49", "head"),
    "dots.llm1": Stated("142", "14"),
    "ernie-4.5-21b-a3b": Stated("21", "3", "head"),
    "ernie-4.5-300b-a47b": Stated("300", "47", "head"),
    "flexolmo-7x7b": Stated("33", ""),  # 20 with four experts a token
    "glm-4.5": Stated("355", "32", "neither"),
    "glm-4.5-air": Stated("106", "12", "neither"),
    "glm-4.5v": Stated("106", "12", "neither"),  # of the text model
    "glm-4.7": Stated("355", "32", "neither"),
    "glm-4.7-flash": Stated("30", "3", "neither"),
    "glm-5": Stated("744", "40", "head"),
    "glm-5.3-flash": Stated("320", "", aside=7.9),  # 18 with the layer that looks ahead
    "glm-5.1-nvfp4": Stated("744", "40", "head"),
    "glm-5.2": Stated("744", "40", "head"),
    "gpt-oss-120b": Stated("116.83", "5.13", "head"),
    "gpt-oss-20b": Stated("20.91", "3.61", "head"),
    "granite-3.1-1b-a400m": Stated("1.3", "0.4", "head"),
    "granite-4.0-h-small": Stated("32", "9"),
    "granite-4.0-h-tiny": Stated("7", "1", "head"),
    "hunyuan-a13b": Stated("80", "13"),
    "hy3-preview": Stated("295", "21"),
    "hy4-preview": Stated("770", "49"),
    "jamba-1.5-large": Stated("398", "94"),
    "jamba-1.5-mini": Stated("52", "12"),
    "k-exaone-236b-a23b": Stated("236", "23"),
    "kimi-k2": Stated("1000", "32", "head"),
    "kimi-k2.5": Stated("1000", "32", "head"),
    "kimi-k2.5-nvfp4": Stated("1000", "32", "head"),
    "kimi-linear-48b-a3b": Stated("49.1", "3"),  # as the hub counts its files
    "laguna-xs.2-fp8": Stated("33", "3"),
    "lfm2-8b-a1b": Stated("8.3", "1.5", "head"),
    "ling-3.0-flash": Stated("124", "5.1", "head"),
    "ling-3.0-tiny": Stated("7.9", "1.3"),
    "llama-4-maverick": Stated("400", "17"),
    "llama-4-scout": Stated("109", "17", aside=0.87),  # the vision tower
    "mellum2-12b-a2.5b": Stated("12", ""),  # 2.5 with the layer that looks ahead
    "mimo-v2-flash": Stated("309", "15"),
    "minimax-m2.5": Stated("230", "10", "head"),
    "minimax-m2.5-nvfp4": Stated("230", "10", "head"),
    "minimax-m2.7": Stated("230", "10", "head"),
    "minimax-m3": Stated("428", "23", "neither"),
    "mistral-large-4": Stated("1000", "52", "head"),
    "mistral-small-4-119b": Stated("119", "6"),
    "mixtral-8x22b": Stated("141", "39"),
    "mixtral-8x7b": Stated("46.7", "12.9"),
    "nemotron-3-nano-30b-a3b": Stated("31.6", "3.6"),
    "nemotron-3-super-120b-a12b": Stated("120.6", "12.7"),
    "nemotron-3-ultra-550b-a55b": Stated("550", "55", "head"),
    "north-mini-code": Stated("30", "3", "head"),
    "olmoe-1b-7b": Stated("6.9", "1.3"),
    "phi-3.5-moe": Stated("41.9", "6.6"),
    "qwen1.5-moe-a2.7b": Stated("14.3", "2.7"),
    "qwen2-57b-a14b": Stated("57.4", "14"),
    "qwen3-235b-a22b": Stated("235", "22"),
    "qwen3-30b-a3b": Stated("30.5", "3.3"),
    "qwen3-30b-a3b-fp8": Stated("30.5", "3.3"),
    "qwen3-coder-480b-a35b": Stated("480", "35"),
    "qwen3-vl-235b-a22b": Stated("235", "22"),
    "qwen3-vl-30b-a3b": Stated("30", "3"),
    "qwen3-next-80b-a3b": Stated("80", "3"),
    "qwen3.5-122b-a10b": Stated("122", "10"),
    "qwen3.5-35b-a3b": Stated("35", "3"),
    "qwen3.5-397b-a17b": Stated("397", "17"),
    "qwen3.5-397b-a17b-nvfp4": Stated("397", "17"),
    "qwen3.6-35b-a3b-nvfp4": Stated("35", "3"),
    "sarvam-105b": Stated("105", "10.3", "neither"),
    "sarvam-30b": Stated("32", "2.4", "neither"),
    "solar-open-100b": Stated("102.6", "12"),
    "step-3.7-flash": Stated("196", "11", "head"),
    "trinity-large": Stated("400", "13"),
    "trinity-mini": Stated("26", "3"),
    "trinity-nano": Stated("6", "1"),
}
"""Numbers of model cards and technical reports (see published/SOURCES.md). Layers that look ahead
and vision towers are not among them, or less than a hundredth."""

ALL = pytest.mark.parametrize("name", sorted(STATED))


def test_all_configurations_are_stated() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(STATED)


@ALL
def test_parameters(name: str) -> None:
    """Within 1 % of the stated numbers, or what these are when rounded or cut."""
    stated, info = STATED[name], load(load_config(FOLDER / f"{name}.json")).info
    table = info.vocab * info.hidden
    beside = {"all": table, "head": 0, "neither": -table}[stated.counted]
    _assert_meant(stated.total, info.parameters + stated.aside * 1e9)
    if stated.active:
        _assert_meant(stated.active, info.active_parameters + beside)


def _assert_meant(stated: str, found: float) -> None:
    value, digits = float(stated), len(stated.partition(".")[2])
    unit = 100.0 if value >= 1000 else 10.0**-digits  # "1T"
    near = abs(found / 1e9 - value) <= value / 100
    assert near or value - unit / 2 <= found / 1e9 < value + unit, (stated, found)


@pytest.mark.few(6)
@ALL
def test_compiles(name: str) -> None:
    """The first layers, for both machines."""
    _compile(name, FEW)


@pytest.mark.slow
@ALL
def test_compiles_whole(name: str) -> None:
    _compile(name, 0)


def _compile(name: str, layers: int) -> None:
    config = load_config(FOLDER / f"{name}.json")
    for machine in MACHINES:
        plan = hmc.compile(config.path, machine=machine, dummy_weights=True, layers=layers)
        depth = layers or config.text.depth
        assert (plan.model.family, plan.model.layers) == (config.values["model_type"], depth)


def test_the_page_of_models_is_printed_from_their_rows() -> None:
    """`hmc models --markdown > docs/models.md` writes it."""
    page = Path(__file__).parents[2] / "docs" / "models.md"
    rows = [FAMILIES[name] for name in sorted(FAMILIES)]
    assert page.read_text().splitlines() == "\n".join(markdown(rows)).splitlines()
