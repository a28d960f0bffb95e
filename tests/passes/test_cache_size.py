"""How many tokens the cache of a plan holds: by the memory that is free, or as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hmc
from hmc.errors import CapacityError, UsageError
from hmc.machine.detect import load_machine
from hmc.plan import Plan
from hmc.tune.replan import replan

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "configs" / "qwen3-30b-a3b-fp8"
BLOCK, BATCH = 64, 16


def compiled(**options: Any) -> Plan:
    return hmc.compile(CONFIG, dummy_weights=True, layers=2, max_context=8192, **options)


def with_memory(size: float) -> Any:
    return load_machine("laptop").model_copy(update={"memory_bytes": int(size)})


def test_where_memory_is_free_every_sequence_has_a_context() -> None:
    plan = compiled(machine=with_memory(64e9))
    assert plan.kv.capacity_tokens == BATCH * 8192
    (said,) = (each for each in plan.decisions if each.subject == "cache")
    assert said.choice.startswith(f"{BATCH * 8192} tokens")
    assert "--cache-tokens" in said.reason


def test_the_cache_takes_half_of_what_weights_and_a_tenth_leave() -> None:
    weights = sum(item.bytes for item in compiled().ledger if item.detail == "weights")
    token = compiled().kv.bytes_per_token
    free = 60_000 * token
    plan = compiled(machine=with_memory((weights + free) / 0.9))
    assert 0 <= 30_000 - plan.kv.capacity_tokens < 2 * BLOCK
    assert not plan.too_large
    tight = compiled(machine=with_memory((weights + 1000 * token) / 0.9))
    assert tight.kv.capacity_tokens == 8192 + BLOCK * (BATCH - 1)  # one context fits anyhow


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"cache_tokens": 8192}, 8192),
        ({"cache_tokens": 10_000}, 10_048),
        ({"cache_tokens": 10_000, "concurrency": 40}, 10_048),
        ({"concurrency": 20}, 20 * 8192 + BLOCK * 19),
    ],
)
def test_what_is_asked_for_is_kept(options: dict[str, int], tokens: int) -> None:
    plan = compiled(machine=with_memory(64e9), **options)
    assert plan.kv.capacity_tokens == tokens
    assert plan.limits.max_batch == max(BATCH, options.get("concurrency", 1))


def test_a_context_is_no_longer_than_the_cache_asked_for() -> None:
    plan = hmc.compile(CONFIG, dummy_weights=True, layers=2, cache_tokens=4000)
    assert (plan.limits.max_context, plan.kv.capacity_tokens) == (3968, 4032)


def test_a_cache_for_no_context_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--cache-tokens 8000: .* need 8192 at least"):
        compiled(cache_tokens=8000)
    with pytest.raises(UsageError, match="must not be negative"):
        compiled(cache_tokens=-1)


def test_beside_experts_a_gpu_holds_one_context_or_what_is_asked_for() -> None:
    gpu = {"machine": "epyc9355-rtx5090"}
    few = compiled(**gpu, vram=2)
    assert few.kv.capacity_tokens == 8192 + BLOCK * (BATCH - 1)
    more = compiled(**gpu, vram=2, cache_tokens=20_032)
    assert more.kv.capacity_tokens == 20_032
    assert few.ledger_totals["gpu0"] <= 2e9 and more.ledger_totals["gpu0"] <= 2e9
    with pytest.raises(CapacityError, match="memory of gpu0 binds"):
        compiled(**gpu, vram=2, cache_tokens=10_000_000)


def test_a_gpu_with_room_for_all_experts_has_a_context_for_every_sequence() -> None:
    plan = compiled(machine="epyc9355-rtx5090")
    assert plan.kv.capacity_tokens == BATCH * 8192
    assert {tier for each in plan.placement for tier in each.tiers} == {"gpu0"}
    assert not plan.too_large


def test_whoever_plans_anew_asks_for_the_same() -> None:
    plan = compiled(cache_tokens=8192)
    assert replan(plan, plan.placement).kv == plan.kv
