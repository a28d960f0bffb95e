"""Collectives between ranks in blocks of rows: the same bits, the same bytes on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from device_ops_fake import Buffers, call_of, random, step_of
from layouts import keys_and_values, layout

from hmc.runtime.device_ops import DEVICE_OPS, scratch
from hmc.runtime.device_ops.link import Link
from hmc.runtime.device_ops.shares import Call, Share, of_share
from hmc.runtime.memory.kv import KVCache

TOKENS, WIDTH = 11, 3  # of two ranks one has 5 rows, the other 6


@pytest.fixture
def links(tmp_path: Path) -> Iterator[list[Link]]:
    """Two ranks in threads."""
    both = [Link(rank, 2, 20.0) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda link: link.connect(tmp_path / "store", torch.device("cpu")), both))
    yield both
    for link in both:
        link.close()


def call() -> Call:
    kv = KVCache(layout(*keys_and_values(16, 16), block=4, tokens=64, sequences=2), 64)
    return call_of(kv, [(0, TOKENS)], [TOKENS - 1], ranks=2)


def run(
    op: str, links: list[Link], values: Callable[[int], dict[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """What each rank has in y of `values(rank)`."""

    def one(link: Link) -> torch.Tensor:
        phase = SimpleNamespace(ranks=2, steps=[])
        buffers = Buffers(values(link.rank), link=link, phase=phase)
        step = step_of(op, buffers, f"y{link.rank}")
        DEVICE_OPS[op](buffers, step)(call())  # type: ignore[arg-type]
        return buffers.values[f"y{link.rank}"]

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(one, links))


@pytest.mark.parametrize("bytes_", [1 << 20, 200, 1])
def test_sums_of_all_ranks_in_blocks(
    links: list[Link], bytes_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "BYTES", bytes_)
    parts = [random(TOKENS, WIDTH, seed=rank) for rank in range(2)]
    found = run(
        "exchange", links, lambda rank: {f"x{rank}": parts[rank], f"y{rank}": torch.zeros(6, WIDTH)}
    )
    for rank, (mine, link) in enumerate(zip(found, links, strict=True)):
        terms = [part if r == rank else part.bfloat16() for r, part in enumerate(parts)]
        share = Share("rank", rank, 2)
        expected = of_share(terms[0].float() + terms[1], share, TOKENS, slice(0, TOKENS))
        assert torch.equal(mine[: len(expected)], expected)
        assert link.sent == 2 * WIDTH * (TOKENS - len(expected))


@pytest.mark.parametrize("bytes_", [1 << 20, 40, 1])
def test_rows_of_all_ranks_in_blocks(
    links: list[Link], bytes_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "BYTES", bytes_)
    rows = random(TOKENS, WIDTH)

    def values(rank: int) -> dict[str, torch.Tensor]:
        mine = torch.zeros(6, WIDTH)
        own = of_share(rows, Share("rank", rank, 2), TOKENS, slice(0, TOKENS))
        mine[: len(own)] = own
        return {f"x{rank}": mine, f"y{rank}": torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16)}

    for whole, link in zip(run("all_gather", links, values), links, strict=True):
        assert torch.equal(whole, rows.bfloat16())
        assert link.sent == 2 * WIDTH * 6
