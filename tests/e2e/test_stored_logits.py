"""Logits of checkpoints in every format as others write it: no further from float32 on their own
dequantisation than transformers in BF16 is. Sizes are no multiples of 128: N of 576 and 1000, K of
192.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from logit_errors import assert_as_close_as_bf16

import hmc
from hmc.codegen.isa import TIERS, cpu_flags
from hmc.formats import FORMATS

pytest.importorskip("compressed_tensors")  # of the extra "test"
from stored_weights import KEPT, STORED, Storing, store

LENGTHS = (1, 7, 40)
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 96},
    "deepseek_v3": {
        "q_lora_rank": 192,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 122,
        "v_head_dim": 128,
    },
}
"""576 rows of q, or of keys and values of the latent, which make 1000."""
_, *OTHERS = [tier.name for tier in TIERS.values() if tier.flags <= cpu_flags()]

Checkpoint = Callable[..., Path]


def _sizes(family: str, *ways: Storing) -> dict[str, Any]:
    """Widths of MLPs that rows of `ways` may have."""
    most = max(each.whole for each in ways)
    middle = 1000 if most <= 8 else 960
    return {
        **SIZES[family],
        "intermediate_size": middle,
        "moe_intermediate_size": max(160, 3 * most),
    }


@pytest.fixture
def stored(checkpoint: Checkpoint, written: Callable[..., Path]) -> Callable[..., Path]:
    """`stored(family, name, way, ways, section)`: what `store` makes of a family's checkpoint."""

    def get(family: str, name: str, way: Any, ways: tuple[Storing, ...], section: Any) -> Path:
        plain = checkpoint(family, "bf16", layers=2, **_sizes(family, *ways))
        key = f"stored-{family}-{name.replace(' ', '_')}"
        return written(key, lambda directory: store(directory, plain, way, section))

    return get


def _check(directory: Path, formats: set[str]) -> None:
    with hmc.Engine(hmc.compile(directory, max_chunk=32, max_context=64, threads=2)) as engine:
        plan = engine.plan
        found = {each.format for each in (*plan.weights, *plan.experts)}
        assert found - {"bf16", "f32"} == formats
        for ours in (engine.logits, engine.decode_logits):
            assert_as_close_as_bf16(ours, directory / "twin", LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("name", STORED)
def test_one_format(stored: Callable[..., Path], family: str, name: str) -> None:
    way = STORED[name]
    experts = STORED["fp8 of V4"] if name == "mxfp4-i8" else way  # which are all that V4 has so
    forms = {way.form, experts.form}
    directory = stored(
        family,
        name,
        lambda module: way if ".experts." in module else experts,
        (way, experts),
        way.section,
    )
    _check(directory, forms)


MIXED: dict[str, dict[str, str]] = {
    "attention FP8, experts INT4": {"self_attn": "fp8-channel", "mlp": "int4"},
    "gate and up MXFP4, down FP8": {"down_proj": "fp8-channel", "": "mxfp4"},
    "down by another group": {
        "down_proj": "int4",
        "mlp": "int4 by 64",
        "": "fp8-tensor of compressed-tensors",
    },
    "by layer": {r"layers\.0\.": "nvfp4", r"layers\.1\.": "int8-packed"},
}
"""Formats of compressed-tensors by regexes of modules, the first that is found in a name."""


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(family, name, marks=pytest.mark.slow) for name in MIXED for family in SIZES],
)
def test_formats_beside_each_other(stored: Callable[..., Path], family: str, name: str) -> None:
    ways = {regex: STORED[each] for regex, each in MIXED[name].items()}
    groups, before = {}, ""
    for number, (regex, way) in enumerate(ways.items()):
        target = f"re:{before}.*{regex}.*"
        groups[f"group_{number}"] = {**way.group, "targets": [target]}
        before += f"(?!.*{regex})"
    section = {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": KEPT,
               "config_groups": groups}  # fmt: skip

    def way(module: str) -> Storing:
        return next(each for regex, each in ways.items() if re.search(regex, module))

    directory = stored(family, name, way, tuple(ways.values()), section)
    _check(directory, {each.form for each in ways.values()})


def test_every_format_is_written_by_others() -> None:
    """But those that GGUF has, and plain ones."""
    coded = {row.name for row in FORMATS.values() if row.scales}
    assert coded == {each.form for each in STORED.values()}
