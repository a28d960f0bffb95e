"""What the cost model says of a layer's launches and bytes against what is handed over."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from counted import layer
from hybrid_plans import ONE, plan_for

from hmc.plan.phases import STREAM

CASES = [
    ("deepseek-v3", 5, STREAM, 20_000, 0),
    ("deepseek-v3", 5, "decode", 1, 2048),
    ("deepseek-v3", 5, "decode", 4, 32_000),
    ("qwen3-30b-a3b-fp8", 3, STREAM, 20_000, 0),
    ("qwen3-30b-a3b-fp8", 3, "decode", 1, 2048),
]


@pytest.mark.parametrize(("model", "layers", "phase", "tokens", "context"), CASES)
def test_a_layers_launches_and_bytes_are_those_predicted(
    model: str, layers: int, phase: str, tokens: int, context: int
) -> None:
    plan = plan_for(model, ONE, layers, vram=26 if model == "deepseek-v3" else 2.5)
    counted, predicted = layer(plan, phase, layers - 1, tokens, context)
    assert predicted.launches / 1.5 <= counted.total <= 1.5 * predicted.launches, counted.launches
    assert predicted.bytes / 1.5 <= counted.bytes <= 1.5 * predicted.bytes
