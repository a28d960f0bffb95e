"""A crowd over every interface: everyone gets an end, and the server is afterwards what it was."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import httpx
import pytest
from crowd import KINDS, Crowd
from processes import held, idle, metric, serving, wait_for

from hmc.compiler import compile as compile_plan
from hmc.plan import save_plan

REQUESTS = int(os.environ.get("HMC_TEST_REQUESTS", "48"))
AT_ONCE = 64
WARM = 30 + REQUESTS // 10
_MOST_GROWTH = 32e6
"""Bytes that the server, or a child of it, may gain over the crowd once it is warm: fragments of
the allocator's, and no more for 3,000 requests than for 48."""
_POOL = min(32, (os.cpu_count() or 1) + 4)
"""Threads of asyncio's pool, which a short warm-up does not fill."""


@pytest.fixture(scope="module")
def crowded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for as many at a time, whose cache is too small for all of them."""
    path = tmp_path_factory.mktemp("load") / "tiny.hmp"
    plan = compile_plan(model, threads=2, max_context=1024, concurrency=AT_ONCE, cache_tokens=4096)
    save_plan(plan, path)
    return path


def test_a_crowd_leaves_nothing_behind(crowded: Path) -> None:
    with serving(crowded, "--max-queue", "96") as (process, url):
        asyncio.run(Crowd(url, AT_ONCE).come(range(WARM)))
        wait_for(lambda: idle(url))
        before = held(process.pid)
        told = asyncio.run(Crowd(url, AT_ONCE).come(range(WARM, WARM + REQUESTS)))
        wait_for(lambda: idle(url))
        wait_for(lambda: held(process.pid).descriptors <= before.descriptors)
        after = held(process.pid)
        print(f"\n{told}\n{before}\n{after}")  # pytest -s shows the figures
        assert sum(told.kinds.values()) == REQUESTS and set(told.kinds) == set(KINDS)
        assert after.resident - before.resident < _MOST_GROWTH
        assert after.child - (before.child or after.child) < _MOST_GROWTH
        assert after.threads <= before.threads + _POOL
        assert metric(url, "hmc_kv_blocks_cached") <= metric(url, "hmc_kv_blocks_total")
        ends = httpx.get(f"{url}/metrics").text
        assert 'hmc_requests_total{reason="error"}' not in ends
        assert 'reason="cancelled"' in ends
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "Traceback" not in said, said
