"""Latent attention to chosen positions: what is gathered, and many tokens against float64. Queries,
probabilities and absorbed results are rounded to bf16 on the way.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from dealt import dealt
from kernel_calls import address, bf16, filled, floats, from_bf16, guarded, in_turn, spec_of
from kernel_meanings import Options, mla_absorb, mla_attention, mla_gather, mla_up
from paged import Paged
from prefill_data import Stored, need, run, stored

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.prefill_form import prefill_scratch_bytes
from hmc.codegen.kernels.attention.sparse import gathered_rows, sparse_scratch_bytes
from hmc.codegen.spec import KernelSpec, WeightFormat

Params = dict[str, int]
SHAPES: list[Params] = [
    {"heads": 16, "nope": 128, "rope": 64, "v_dim": 128, "rank": 512, "block": 32,
     "tokens": 16, "index_topk": 290},
    {"heads": 5, "nope": 28, "rope": 10, "v_dim": 45, "rank": 202, "block": 10,
     "tokens": 3, "index_topk": 33, "sinks": 1},
    {"heads": 4, "nope": 48, "rope": 0, "v_dim": 48, "rank": 64, "block": 16,
     "tokens": 4, "index_topk": 35, "pool": 4},
    {"heads": 6, "nope": 36, "rope": 0, "v_dim": 20, "rank": 96, "block": 16,
     "tokens": 4, "index_topk": 40},
]  # fmt: skip


def choices(rng: np.random.Generator, positions: np.ndarray, params: Params) -> np.ndarray:
    """Random positions [tokens, most + 1], as an indexer would choose them, which are as many as it
    would.
    """
    found = np.full((len(positions), params["index_topk"] + 1), -1, np.int32)
    for row, position in zip(found, positions, strict=True):
        count = kept(position, params)
        row[:count] = np.sort(rng.permutation(position + 1)[:count])
    return guarded(found)


def kept(position: int, params: Params) -> int:
    """How many positions a token chooses: all, or of pools whole ones and its own."""
    most, pool = params["index_topk"], params.get("pool", 1)
    return int(position + 1 if position < most else most + 1 - pool + (position + 1) % pool)


@pytest.mark.few(1)
@pytest.mark.parametrize(("params", "isa"), dealt(SHAPES, TIERS))
def test_gather(jit: Jit, isa: str, params: Params) -> None:
    """Positions that no indexer chooses lead nowhere."""
    need(isa)
    rng = np.random.default_rng(1)
    paged = Paged.of(rng, params["block"], [(0, 398), (1, 0), (2, 20), (0, 399), (3, -1)])
    bits, _ = paged.rows(rng, params["rank"] + params["rope"])
    cache, chosen = guarded(bits), choices(rng, paged.positions, params)
    chosen[0, :4] = -7, 399, 2**31 - 1, -(2**31)
    shape = (5, gathered_rows(spec_of("mla_gather", isa, params)), bits.shape[2])
    for workers in (1, 3):
        gathered, lasts = filled(shape, np.uint16), filled((5,), np.int32)
        in_turn(
            jit, spec_of("mla_gather", isa, params), workers, cache=address(cache),
            tables=address(paged.tables), table_stride=paged.tables.shape[1],
            sequence=address(paged.sequence), positions=address(paged.positions),
            chosen=address(chosen), chosen_stride=chosen.shape[1], gathered=address(gathered),
            lasts=address(lasts), tokens=5,
        )  # fmt: skip
        for token, last in enumerate(paged.positions):
            count = kept(last, params)
            assert lasts[token] == count - 1
            table = paged.tables[paged.sequence[token]]
            rows = mla_gather(bits, table, chosen[token, :count], int(last))
            assert (gathered[token, : len(rows)] == rows).all()
            assert (gathered[token, len(rows) :] == 77).all()


class Case:
    """`tokens` queries after `past` positions: the second of two sequences, the first unseen."""

    def __init__(
        self, isa: str, weight: WeightFormat, params: Params, past: int, tokens: int
    ) -> None:
        need(isa)
        rng = np.random.default_rng(past + tokens)
        self.isa, self.weight, self.params = isa, weight, params
        heads, nope, rope, v_dim, rank = (
            params[name] for name in ("heads", "nope", "rope", "v_dim", "rank")
        )
        w = stored(rng, weight, heads * (nope + v_dim), rank)
        self.w = Stored(guarded(w.data), guarded(w.scale), w.values)
        self.values = w.values.reshape(heads, nope + v_dim, rank)
        places = [(s, past + t) for s in (0, 1) for t in range(tokens)]
        paged = Paged.of(rng, params["block"], places)
        paged.positions[:tokens] = -1  # so that `rows` makes all of them NaN
        _, rows = paged.rows(rng, rank + rope)
        rows[..., :rank] *= 2.0 ** -np.round(np.log2(w.values.std() * rank**0.5))
        self.tables, self.cache = paged.tables, guarded(bf16(rows))
        self.positions = guarded(paged.positions[tokens:])
        self.q = guarded(2 * floats(rng, tokens, heads * (nope + rope) + 3))
        self.chosen = choices(rng, self.positions, params)
        self.scale = float((nope + rope) ** -0.5)
        self.sinks = guarded(np.linspace(-3, 2, heads, dtype=np.float32))

    @property
    def sparse(self) -> np.ndarray:
        """Which tokens do not see all."""
        found: np.ndarray = self.positions >= self.params["index_topk"]
        return found

    def exact(self) -> np.ndarray:
        """f64 [tokens, heads, v_dim] of the tokens that do not see all."""
        nope = self.params["nope"]
        options = Options(sinks=self.sinks if self.params.get("sinks") else None)
        queries = self.q[:, :-3].reshape(len(self.q), self.params["heads"], -1)
        found = []
        for token in np.flatnonzero(self.sparse):
            last, query = int(self.positions[token]), queries[token : token + 1]
            most = kept(last, self.params)
            rows = mla_gather(self.cache, self.tables[1], self.chosen[token, :most], last)[:most]
            inner = mla_absorb(query, self.values, nope)
            one = np.zeros((1, 1), np.int32)
            mixed = mla_attention(
                query, inner, from_bf16(rows)[None], one, one[0], one[0] + most - 1, self.scale,
                options,
            )  # fmt: skip
            found.append(mla_up(mixed, self.values, nope)[0])
        return np.stack(found)

    def run(self, jit: Jit, workers: int, first: int = 0, stop: int | None = None) -> np.ndarray:
        """y bits [tokens, heads, v_dim] of the chunk [first, stop), by both kernels."""
        part = slice(first, stop)
        given = {"q": self.q[part], "positions": self.positions[part], "chosen": self.chosen[part]}
        given = {name: guarded(each) for name, each in given.items()}
        tokens, width = len(given["q"]), self.params["heads"] * self.params["v_dim"]
        given["y"] = filled((tokens, width + 1), np.uint16)
        for op in ("mla_prefill", "sparse_mla_prefill"):
            scratch = guarded(np.full(workers * self.scratch(op), 0xFF, np.uint8))
            in_turn(jit, self.spec(op), workers, **self.arguments(op, scratch, **given))
        y = given["y"]
        assert (y[:, width:] == 77).all()
        return y[:, :width].reshape(tokens, self.params["heads"], -1)

    def spec(self, op: str) -> KernelSpec:
        """Of one of the two kernels."""
        return spec_of(op, self.isa, self.params, self.weight)

    def scratch(self, op: str) -> int:
        """Bytes for each worker."""
        size = prefill_scratch_bytes if op == "mla_prefill" else sparse_scratch_bytes
        return size(self.spec(op))

    def arguments(
        self, op: str, scratch: np.ndarray, q: np.ndarray, positions: np.ndarray,
        chosen: np.ndarray, y: np.ndarray,
    ) -> dict[str, int | float]:  # fmt: skip
        """The argument block."""
        choice = {"chosen": address(chosen), "chosen_stride": chosen.shape[1]}
        self.sequence = guarded(np.full(len(q), 1, np.int32))
        return {
            "q": address(q), "q_stride": q.shape[1], "cache": address(self.cache),
            "w": address(self.w.data), "w_scale": address(self.w.scale),
            "tables": address(self.tables), "table_stride": self.tables.shape[1],
            "sequence": address(self.sequence), "positions": address(positions), "y": address(y),
            "y_stride": y.shape[1], "tokens": len(q), "scale": self.scale,
            "scratch": address(scratch), "sinks": address(self.sinks),
            **({"growth": 0.0} if op == "mla_prefill" else choice),
        }  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize(("weight", "params", "isa"), dealt(["bf16", "fp8"], SHAPES, TIERS))
def test_many(jit: Jit, isa: str, weight: WeightFormat, params: Params) -> None:
    most = params["index_topk"]
    case = Case(isa, weight, params, most - 20, 50)
    whole = case.run(jit, 1)
    found, exact = from_bf16(whole[case.sparse]), case.exact()
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert len(exact) == 30 and error < (7e-3 if isa == "avx512_bf16" else 3e-3), error
    for workers in (2, 3, 40):
        assert (case.run(jit, workers) == whole).all()
    parts = [case.run(jit, 2, *cut) for cut in pairwise((0, 1, 20, 21, 39, 50))]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.slow
def test_workers_at_once(jit: Jit) -> None:
    case = Case(next(iter(TIERS)), "fp8", SHAPES[1], 40, 60)
    alone, op = case.run(jit, 1), "sparse_mla_prefill"
    y, scratch = np.zeros((60, 5 * 45), np.uint16), np.zeros(4 * case.scratch(op), np.uint8)
    given = case.arguments(op, scratch, case.q, case.positions, case.chosen, y)
    run(jit, case.spec(op), 4, **given)
    assert (y.reshape(alone.shape) == alone).all()
