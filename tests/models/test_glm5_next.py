"""GLM-5.3 beyond what all families are tested for: contexts of which few pools are chosen, in
chunks, in batches, on a device; which layers are linear, and configurations that are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beyond_choice import LENGTH, close, continued, decode_continues, in_chunks
from parity import errors
from played import executor
from reference import load_model, run
from split_plans import STREAM, split_plan
from tiny_models import FOLDER, Floats, prompt, write

import hmc
from hmc.checkpoint.config import ModelConfig, load_config
from hmc.errors import HmcError
from hmc.models import load
from hmc.models.delta import KimiDeltaNet

SHARP = {"n_routed_experts": 4, "num_experts_per_tok": 4, "index_topk": 64}
"""All experts are taken: no near tie of a router goes another way."""


@pytest.fixture(scope="module")
def directory(written: Callable[..., Path]) -> Path:
    return written("glm5_next", lambda found: write(found, "glm5_next", **SHARP))


@pytest.fixture(scope="module")
def exact(directory: Path) -> Floats:
    """Logits of the prompt in float32, by the blocks, which test_tiny.py holds to transformers."""
    return run(load_model(directory).module, prompt(LENGTH)).numpy()


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[hmc.Engine]:
    plan = hmc.compile(directory, max_context=256, max_chunk=64, threads=2)
    with hmc.Engine(plan, threads=2) as found:
        yield found


@pytest.mark.slow
def test_chunks(engine: hmc.Engine, exact: Floats) -> None:
    """All is chosen up to 67 positions, then pools."""
    for size in (7, 33, 64):
        found = in_chunks(engine.executor, prompt(LENGTH), size)
        close(found[67:], exact[67:])
        assert errors(found, exact)[:67].max() < 0.06


@pytest.mark.slow
def test_decode_continues(engine: hmc.Engine, exact: Floats) -> None:
    decode_continues(engine.executor, exact, (5, 61, 130))


@pytest.mark.slow
def test_on_a_device(directory: Path, exact: Floats) -> None:
    plan = split_plan(directory, switches=True)
    ids = np.array(prompt(LENGTH), np.int32)
    names = [phase.name for phase in plan.phases if phase.name.startswith("prefill")]
    assert STREAM in names
    with executor(plan, directory) as found:
        for name in names:
            close(continued(found, ids, name, 60), exact[139:])


def _config(**changes: Any) -> ModelConfig:
    config = load_config(FOLDER / "glm5_next.json")
    return config.with_text(**changes)


def test_layers_count_from_0() -> None:
    sections = {"kda_layers": [0, 2], "full_attn_layers": [1, 3]}
    for changes, linear in (
        ({}, [0, 1, 2]),
        ({"linear_attn_config": sections | {"num_heads": 3, "head_dim": 32}}, [0, 2]),
        ({"linear_attn_config": None, "linear_num_heads": 3, "linear_head_dim": 32}, [0, 1, 2]),
    ):
        module = load(_config(**changes)).module
        layers = module.get_submodule("model.layers").children()
        found = [
            index
            for index, layer in enumerate(layers)
            if any(isinstance(each, KimiDeltaNet) for each in layer.modules())
        ]
        assert found == linear


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_rope_head_dim": 16}, "qk_rope_head_dim"),
        ({"index_kpool": 3}, "index_topk"),
        ({"index_kpool": 1}, "index_kpool"),
        ({"index_kpool_always_select_tail": False}, "index_kpool_always_select_tail"),
        ({"indexer_types": ["full", "full", "full", "shared"]}, "indexer_types"),
        ({"linear_attn_config": {"kda_layers": [0, 1, 3], "full_attn_layers": [3]}}, "kda_layers"),
        ({"layer_types": ["mamba"] * 4, "linear_attn_config": None}, "layer_types"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(HmcError, match=words) as caught:
        load(_config(**changes))
    assert "\n" not in str(caught.value)
