"""The indexer's kernels against float64. Queries, keys and weights are small whole numbers, so that
every score is exact, and many are equal.
"""

from __future__ import annotations

import numpy as np
import pytest
from dealt import dealt
from kernel_calls import address, bf16, filled, floats, from_bf16, guarded, in_turn, spec_of
from kernel_meanings import index_choose, index_scores
from paged import Paged
from prefill_data import need, run

from hmc.codegen.isa import TIERS, best_isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.index import scores_stride

Params = dict[str, int]
SHAPES: list[Params] = [
    {"heads": 64, "dim": 128, "block": 32, "index_topk": 100},
    {"heads": 5, "dim": 10, "block": 10, "index_topk": 1},
    {"heads": 33, "dim": 34, "block": 7, "index_topk": 45},
]
PLACES = [(0, 298), (1, 0), (2, 255), (0, 299), (3, 99), (4, 100), (5, -1)]


class Case:
    """Tokens at `places` (sequence, position), and what is behind them in a paged cache."""

    def __init__(self, isa: str, params: Params, places: list[tuple[int, int]]) -> None:
        need(isa)
        self.isa, self.params, self.places = isa, params, places
        rng = np.random.default_rng(len(places))
        heads, dim = params["heads"], params["dim"]
        self.paged = Paged.of(rng, params["block"], places)
        shape = (self.paged.blocks, params["block"], dim)
        self.keys = guarded(bf16(rng.integers(-2, 3, shape).astype(np.float32)))
        self.q = guarded(rng.integers(-2, 3, (len(places), heads * dim + 3)).astype(np.float32))
        self.weights = guarded(rng.integers(-3, 4, (len(places), heads + 1)).astype(np.float32))
        self.stride = scores_stride(params["block"], self.paged.max_context)

    @property
    def expected(self) -> np.ndarray:
        """The choice of each token."""
        found, heads, block = [], self.params["heads"], self.params["block"]
        for token, (sequence, position) in enumerate(self.places):
            at = np.arange(position + 1)
            keys = from_bf16(self.keys[self.paged.tables[sequence][at // block], at % block])
            q = self.q[token, :-3].reshape(heads, -1)
            scores = index_scores(q, self.weights[token, :-1], keys)
            found.append(index_choose(scores, self.params["index_topk"]))
        return np.stack(found)

    def arguments(self, chosen: np.ndarray) -> dict[str, int]:
        """Those that are alike."""
        paged = self.paged
        return {
            "q": address(self.q), "q_stride": self.q.shape[1], "weights": address(self.weights),
            "weights_stride": self.weights.shape[1], "cache": address(self.keys),
            "tables": address(paged.tables), "table_stride": paged.tables.shape[1],
            "sequence": address(paged.sequence), "positions": address(paged.positions),
            "tokens": len(self.places), "scores_stride": self.stride,
            "chosen": address(chosen), "chosen_stride": chosen.shape[1],
        }  # fmt: skip

    def few(self, jit: Jit, workers: int) -> np.ndarray:
        """As decode chooses."""
        scores = guarded(np.full((len(self.places), self.stride), np.nan, np.float32))
        chosen, names = self._chosen(), {"q", "weights", "cache", "tables", "table_stride"}
        every = self.arguments(chosen) | {"scores": address(scores)}
        of_scores = {*every} - {"chosen", "chosen_stride"}
        of_choice = {*every} - names - {"q_stride", "weights_stride", "sequence"}
        for op, wanted in (("index_scores", of_scores), ("index_choose", of_choice)):
            given = {name: every[name] for name in wanted}
            in_turn(jit, spec_of(op, self.isa, self.params), workers, **given)
        return self._checked(chosen)

    def many(self, jit: Jit, workers: int) -> np.ndarray:
        """As prefill does."""
        scratch = guarded(np.full((workers, self.stride), np.nan, np.float32))
        chosen = self._chosen()
        given = self.arguments(chosen) | {"scratch": address(scratch)}
        in_turn(jit, spec_of("index_prefill", self.isa, self.params), workers, **given)
        return self._checked(chosen)

    def _chosen(self) -> np.ndarray:
        return filled((len(self.places), self.params["index_topk"] + 2), np.int32)

    def _checked(self, chosen: np.ndarray) -> np.ndarray:
        most = self.params["index_topk"]
        assert (chosen[:, most:] == 77).all()
        return chosen[:, :most]


@pytest.mark.few(2)
@pytest.mark.parametrize(("params", "isa"), dealt(SHAPES, TIERS))
def test_few(jit: Jit, isa: str, params: Params) -> None:
    case = Case(isa, params, PLACES)
    for workers in (1, 2, 3, 31):
        assert (case.few(jit, workers) == case.expected).all()


@pytest.mark.few(2)
@pytest.mark.parametrize(("params", "isa"), dealt(SHAPES, TIERS))
def test_many(jit: Jit, isa: str, params: Params) -> None:
    """A prompt, some of whose tokens see no more than can be chosen."""
    case = Case(isa, params, [(0, position) for position in range(60, 130)])
    for workers in (1, 3, 80):
        assert (case.many(jit, workers) == case.expected).all()


def test_workers_at_once(jit: Jit) -> None:
    case = Case(next(iter(TIERS)), SHAPES[0], [(0, 150 + position) for position in range(50)])
    scratch, chosen = np.zeros((4, case.stride), np.float32), np.zeros((50, 100), np.int32)
    given = case.arguments(chosen) | {"scratch": address(scratch)}
    run(jit, spec_of("index_prefill", case.isa, case.params), 4, **given)
    assert (chosen == case.expected).all()


@pytest.mark.parametrize("scores", ["equal", "nan", "wide"])
def test_the_best_of_any_numbers(jit: Jit, scores: str) -> None:
    """NaN is below all, both zeros are equal, infinities are numbers."""
    rng, params = np.random.default_rng(1), SHAPES[0]
    rows = rng.standard_normal((3, 512)).astype(np.float32)
    lengths = np.array([512, 101, 333])
    if scores == "equal":
        rows[:] = np.where(rng.random(rows.shape) < 0.5, 0.0, -0.0)
    elif scores == "nan":
        rows[rng.random(rows.shape) < 0.9] = np.nan
    else:
        rows = (rows * 10.0 ** rng.integers(-38, 38, rows.shape)).astype(np.float32)
        rows[:, [3, 70, 90]] = np.inf, -np.inf, -np.inf
    clean = np.where(np.isnan(rows), -np.inf, rows)
    most = params["index_topk"]
    expected = [index_choose(row[:n], most) for row, n in zip(clean, lengths, strict=True)]
    chosen, positions = filled((3, most), np.int32), guarded((lengths - 1).astype(np.int32))
    held = guarded(rows)
    in_turn(
        jit, spec_of("index_choose", best_isa().name, params), 2, positions=address(positions),
        scores=address(held), scores_stride=512, chosen=address(chosen), chosen_stride=most,
        tokens=3,
    )  # fmt: skip
    assert (chosen == np.stack(expected)).all()


@pytest.mark.parametrize("isa", TIERS)
def test_append(jit: Jit, isa: str) -> None:
    need(isa)
    rng, params = np.random.default_rng(4), SHAPES[2]
    dim, block = params["dim"], params["block"]
    paged = Paged.of(rng, block, [(t % 2, t // 2 * 7) for t in range(9)])
    paged.positions[0] = -1
    keys, cache = floats(rng, 9, dim + 2), filled((paged.blocks, block, dim), np.uint16)
    expected = cache.copy()
    for token in range(1, 9):
        expected[paged.place(token)] = bf16(keys[token, :dim])
    in_turn(
        jit, spec_of("index_append", isa, params), 2, indexer_k=address(keys),
        indexer_k_stride=dim + 2, cache=address(cache), tables=address(paged.tables),
        table_stride=paged.tables.shape[1], sequence=address(paged.sequence),
        positions=address(paged.positions), tokens=9,
    )  # fmt: skip
    assert (cache == expected).all()
