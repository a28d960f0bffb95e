"""What attention may be asked besides heads and sizes, as its row says it."""

from __future__ import annotations

import pytest

from hmc.ops import OPS, Stored, Use


def test_kernels_are_made_for_what_attention_is_asked_besides() -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "v_dim": 16, "scale": 0.25}
    options = {"window": 128, "softcap": 30.0, "growth": 0.1, "growth_every": 8, "growth_from": 1}
    row, sinks = OPS["attention"], {"sinks": Stored("bf16")}
    for tokens, wanted in (
        (0, {"attention_prefill": 1}),
        (16, {"attention": 0, "attention_join": 1}),
    ):
        use = Use("avx2", tokens, 64)
        plain = row.kernels(sizes, {}, use)
        assert all(not spec.expr and spec.get("window") == spec.get("sinks") == 0 for spec in plain)
        made = {spec.op: spec for spec in row.kernels({**sizes, **options}, sinks, use)}
        assert {op: made[op].get("sinks") for op in wanted} == wanted
        scored = made[next(iter(wanted))]
        assert scored.expr == "30.0 * tanh(score / 30.0)"
        assert (scored["window"], scored["growth_every"], scored["growth_from"]) == (128, 8, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 8, "chunk": 8},
        {"window": 0},
        {"softcap": 0.0},
        {"growth": 0.1},
        {"growth": 0.1, "growth_every": 0, "growth_from": 0},
        {"kv_heads": 3},
    ],
    ids=str,
)
def test_what_attention_cannot_be_asked(options: dict[str, float]) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "v_dim": 16, "scale": 0.25}
    assert OPS["attention"].possible(sizes)
    assert not OPS["attention"].possible({**sizes, **options})
