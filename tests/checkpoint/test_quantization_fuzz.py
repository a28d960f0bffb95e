"""Published configurations with parts changed at random are read, or refused in one line."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from published import ATTENTION, EXPERT, MATRIX, PUBLISHED

from hmc.checkpoint import Checkpoint, ModelConfig, read_quantization
from hmc.checkpoint.weights import InventedCheckpoint
from hmc.errors import ConfigError, HmcError, TensorError, UnsupportedError

_WORDS = [
    "",
    "re:(",
    "re:.*",
    "*",
    "Linear",
    "fp4",
    "gemm",
    "group",
    "int",
    "mixed-precision",
    "\n",
]
_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 130), st.just(1 << 70), st.just(float("inf")),
    st.sampled_from(_WORDS), st.just([128, 128]), st.just([]), st.just({}), st.just(["re:["]),
)  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(
        value, list) else []  # fmt: skip
    return [path, *(found for key in keys for found in _paths(value[key], (*path, key)))]


@st.composite
def _sections(draw: st.DrawFn) -> Any:
    section: Any = copy.deepcopy(draw(st.sampled_from(list(PUBLISHED.values()))).section)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(_paths(section)[1:]))
        place = section
        for key in parents:
            place = place[key]
        place[last] = copy.deepcopy(draw(_LEAVES))
    return section


@settings(max_examples=300, deadline=None)
@given(_sections())
def test_changed_configurations(section: Any) -> None:
    values = {"quantization_config": section}
    config = ModelConfig(Path("nowhere/config.json"), values, "")
    try:
        quantization = read_quantization(config)
    except (ConfigError, UnsupportedError) as error:
        _one_line(error)
        return
    found = InventedCheckpoint(Path("nowhere"), config, quantization)
    assert isinstance(found, Checkpoint)
    for module in (ATTENTION, EXPERT, "lm_head", ""):
        with suppress(TensorError):
            source = found.resolve(f"{module}.weight", MATRIX, linear=True)
            assert source.tensors and source.nbytes > 0


def _one_line(error: HmcError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 1000
