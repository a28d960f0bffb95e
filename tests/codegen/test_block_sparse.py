"""Block-sparse attention against float64: the indexer's choice, exactly, and attention to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention_options import option_args
from dealt import dealt
from kernel_calls import address, bf16, filled, floats, from_bf16, guarded, in_turn, spec_of
from kernel_meanings import NO_OPTIONS, attention
from paged import Paged
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.attend import attention_scratch_bytes
from hmc.codegen.kernels.attention.block_index import block_scratch_bytes, block_stride
from hmc.codegen.kernels.attention.prefill_form import prefill_scratch_bytes
from hmc.errors import KernelError

Params = dict[str, int]
INDEX: list[Params] = [
    {"heads": 4, "dim": 128, "block": 64, "index_block": 128, "index_topk": 3, "index_local": 1},
    {"heads": 2, "dim": 48, "block": 24, "index_block": 4, "index_topk": 5, "index_local": 2},
    {"heads": 5, "dim": 22, "block": 32, "index_block": 6, "index_topk": 2, "index_local": 1},
    {"heads": 1, "dim": 64, "block": 64, "index_block": 2, "index_topk": 40, "index_local": 1},
]
ATTENTION: list[Params] = [
    {"heads": 16, "kv_heads": 2, "head_dim": 128, "v_dim": 128, "block": 64}
    | {"index_heads": 2, "index_block": 128, "index_topk": 3},
    {"heads": 12, "kv_heads": 4, "head_dim": 48, "v_dim": 40, "block": 24}
    | {"index_heads": 2, "index_block": 4, "index_topk": 5},
    {"heads": 5, "kv_heads": 1, "head_dim": 18, "v_dim": 33, "block": 32}
    | {"index_heads": 1, "index_block": 6, "index_topk": 80},
]
PLACES = [(0, 598), (1, 0), (2, 255), (0, 599), (3, 256), (4, -1), (5, 31), (6, 511)]
"""Sequences and positions: empty, one position, around borders, two tokens of one sequence."""


def best(products: np.ndarray, position: int, params: Params) -> np.ndarray:
    """i32 [index_topk] of one head's products with the positions up to a token's own."""
    size, most = params["index_block"], params["index_topk"]
    own = position // size
    scores = [products[n * size : min((n + 1) * size, position + 1)].max() for n in range(own + 1)]
    scores[max(0, own - params["index_local"] + 1) :] = [np.inf] * min(
        own + 1, params["index_local"]
    )
    order = np.argsort(-np.array(scores), kind="stable")[:most]
    return np.pad(np.sort(order), (0, most - len(order)), constant_values=-1).astype(np.int32)


class Indexed:
    """Queries and keys of whole numbers, so that every product is exact and many are equal."""

    def __init__(self, params: Params, places: list[tuple[int, int]]) -> None:
        rng = np.random.default_rng(params["dim"])
        self.params, self.paged = params, Paged.of(rng, params["block"], places)
        bits, _ = self.paged.rows(rng, params["dim"])
        small = bf16(rng.integers(-2, 3, bits.shape).astype(np.float32))
        self.cache = guarded(np.where(np.isnan(from_bf16(bits)), bits, small))
        width = params["heads"] * params["dim"]
        drawn = rng.integers(-2, 3, (len(places), width + 3))
        self.q = guarded(drawn.astype(np.float32))

    def expected(self) -> np.ndarray:
        """i32 [tokens, heads * index_topk]; rows of tokens at negative positions are -1."""
        params, paged, found = self.params, self.paged, []
        rows = self.q[:, :-3].reshape(len(self.q), params["heads"], -1)
        for token, position in enumerate(paged.positions):
            where = np.arange(position + 1)
            table = paged.tables[paged.sequence[token]]
            keys = from_bf16(self.cache[table[where // paged.block], where % paged.block])
            found.append(
                [
                    best(keys @ row, position, params)
                    if position >= 0
                    else np.full(params["index_topk"], -1)
                    for row in rows[token]
                ]
            )
        return np.array(found).reshape(len(self.q), -1)

    def _arguments(self) -> dict[str, int]:
        paged = self.paged
        self.stride = block_stride(self.params["index_block"], paged.max_context)
        self.width = self.params["heads"] * self.params["index_topk"]
        self.chosen = filled((len(self.q), self.width + 2), np.int32)
        return {
            "q": address(self.q), "q_stride": self.q.shape[1], "cache": address(self.cache),
            "tables": address(paged.tables), "table_stride": paged.tables.shape[1],
            "sequence": address(paged.sequence), "positions": address(paged.positions),
            "tokens": len(self.q), "scores_stride": self.stride,
            "chosen": address(self.chosen), "chosen_stride": self.width + 2,
        }  # fmt: skip

    def _result(self) -> np.ndarray:
        assert (self.chosen[:, self.width :] == 77).all()
        return self.chosen[:, : self.width]

    def few(self, jit: Jit, isa: str, workers: int) -> np.ndarray:
        """What `block_scores` and `block_choose` choose."""
        given = self._arguments()
        rows = len(self.q) * self.params["heads"]
        scores = guarded(np.full((rows, self.stride), np.nan, np.float32))
        given["scores"] = address(scores)
        chosen = {name: given.pop(name) for name in ("chosen", "chosen_stride")}
        in_turn(jit, spec_of("block_scores", isa, self.params), workers, **given)
        names = ("positions", "tokens", "scores", "scores_stride")
        given = {name: given[name] for name in names} | chosen
        in_turn(jit, spec_of("block_choose", isa, self.params), workers, **given)
        return self._result()

    def many(self, jit: Jit, isa: str, workers: int) -> np.ndarray:
        """What `block_prefill` chooses, of one sequence."""
        given, spec = self._arguments(), spec_of("block_prefill", isa, self.params)
        size = workers * block_scratch_bytes(spec, self.paged.max_context)
        scratch = guarded(np.full(size, 0xFF, np.uint8))
        in_turn(jit, spec, workers, **given, scratch=address(scratch))
        return self._result()


@pytest.mark.few(2)
@pytest.mark.parametrize(("isa", "params"), dealt(TIERS, INDEX))
def test_few_tokens_choose_the_best_blocks(jit: Jit, isa: str, params: Params) -> None:
    need(isa)
    case = Indexed(params, PLACES)
    for workers in (1, 3):
        assert (case.few(jit, isa, workers) == case.expected()).all()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("isa", "params", "past", "tokens"), dealt(TIERS, INDEX, [(0, 97), (700, 70), (1, 1)])
)
def test_many_tokens_choose_the_best_blocks(
    jit: Jit, isa: str, params: Params, past: int, tokens: int
) -> None:
    need(isa)
    case = Indexed(params, [(0, past + token) for token in range(tokens)])
    for workers in (1, 3):
        assert (case.many(jit, isa, workers) == case.expected()).all()


def test_a_score_that_is_no_number_is_the_worst(jit: Jit) -> None:
    isa, params = next(iter(TIERS)), INDEX[1]
    need(isa)
    case = Indexed(params, [(0, 59)])
    first = case.paged.tables[0, 0]
    case.cache[first, :4] = 0x7FC0  # the first block
    expected = np.arange(15, dtype=np.int32)
    for found in (case.few(jit, isa, 1), case.many(jit, isa, 1)):
        for row in found.reshape(params["heads"], -1):
            assert 0 not in row and np.isin(row, expected).all() and (np.diff(row) > 0).all()


def chosen_rows(rng: np.random.Generator, positions: np.ndarray, params: Params) -> np.ndarray:
    """Random blocks, the token's own among them, or all where these are no more."""
    found = np.full((len(positions), params["index_heads"], params["index_topk"]), -1, np.int32)
    for token, position in enumerate(positions):
        own = int(position) // params["index_block"]
        for head in found[token]:
            if position >= 0:
                more = rng.permutation(own)[: params["index_topk"] - 1]
                numbers = np.sort([*more, own])
                head[: len(numbers)] = numbers
    return found


class Attended:
    """Tokens that chose blocks, over a cache whose other positions are NaN to none of them."""

    def __init__(self, params: Params, places: list[tuple[int, int]]) -> None:
        rng = np.random.default_rng(params["heads"])
        self.params, self.paged = params, Paged.of(rng, params["block"], places)
        found = [
            self.paged.rows(rng, params["kv_heads"], params[name]) for name in ("head_dim", "v_dim")
        ]
        self.bits, self.values = (
            tuple(guarded(np.ascontiguousarray(pair[n].swapaxes(1, 2))) for pair in found)
            for n in range(2)
        )
        self.q = guarded(2 * floats(rng, len(places), params["heads"] * params["head_dim"] + 3))
        self.chosen = guarded(chosen_rows(rng, self.paged.positions, params))

    def exact(self, *, magnitude: bool = False) -> np.ndarray:
        """The float64 result [tokens, heads, v_dim], or sum p |v|: each key head's tokens over a
        cache of what they chose."""
        params, paged, (k, v) = self.params, self.paged, self.values
        v = np.abs(v) if magnitude else v
        size, per = params["index_block"], params["kv_heads"] // params["index_heads"]
        group = params["heads"] // params["kv_heads"]
        rows = self.q[:, :-3].reshape(len(self.q), params["heads"], -1)
        y = np.zeros((len(self.q), params["heads"], params["v_dim"]))
        for token, position in enumerate(paged.positions):
            for head in range(params["kv_heads"] if position >= 0 else 0):
                chosen = self.chosen[token, head // per]
                where = np.concatenate([n * size + np.arange(size) for n in chosen if n >= 0])
                where = where[where <= position]
                numbers = paged.tables[paged.sequence[token]][where // paged.block]
                keys, mixed = (
                    each[numbers, head, where % paged.block][None, None] for each in (k, v)
                )
                mine = slice(head * group, (head + 1) * group)
                table, none = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
                y[token, mine] = attention(
                    rows[token : token + 1, mine], keys, mixed, table, none,
                    np.array([len(where) - 1]), params["head_dim"] ** -0.5, NO_OPTIONS,
                )  # fmt: skip
        return y

    def _arguments(self) -> dict[str, int | float]:
        paged = self.paged
        self.width = self.params["heads"] * self.params["v_dim"]
        self.y = filled((len(self.q), self.width + 1), np.uint16)
        return {
            "q": address(self.q), "q_stride": self.q.shape[1], "k_cache": address(self.bits[0]),
            "v_cache": address(self.bits[1]), "tables": address(paged.tables),
            "table_stride": paged.tables.shape[1], "sequence": address(paged.sequence),
            "positions": address(paged.positions), "y": address(self.y),
            "y_stride": self.width + 1, "tokens": len(self.q),
            "scale": self.params["head_dim"] ** -0.5, "growth": 0.0,
            "chosen": address(self.chosen), "chosen_stride": self.chosen[0].size,
        }  # fmt: skip

    def _result(self) -> np.ndarray:
        assert (self.y[:, self.width :] == 77).all()
        return self.y[:, : self.width].reshape(len(self.q), self.params["heads"], -1)

    def few(self, jit: Jit, isa: str, workers: int) -> np.ndarray:
        """y bits by `attention` and `attention_join`."""
        given, spec = self._arguments(), replace(spec_of("attention", isa, self.params), out="bf16")
        size = attention_scratch_bytes(spec, len(self.q), self.paged.max_context)
        scratch = guarded(np.full(size, 0xFF, np.uint8))
        given["scratch"] = address(scratch)
        in_turn(jit, spec, workers, **given)
        names = ("positions", "y", "y_stride", "tokens", "scratch")
        join = {name: given[name] for name in names} | option_args("attention_join", NO_OPTIONS)
        in_turn(jit, replace(spec, op="attention_join"), workers, **join)
        return self._result()

    def many(self, jit: Jit, isa: str, workers: int) -> np.ndarray:
        """y bits by `attention_prefill`, of one sequence."""
        spec = replace(spec_of("attention_prefill", isa, self.params), out="bf16")
        scratch = guarded(np.full(workers * prefill_scratch_bytes(spec), 0xFF, np.uint8))
        given = self._arguments()
        in_turn(jit, spec, workers, **given, scratch=address(scratch), sinks=0)
        return self._result()

    def check(self, isa: str, y: np.ndarray) -> None:
        """Assert that `y` is within the bound of rounding: that of y to bf16, and on tiers with dot
        products that of probabilities."""
        rounding = 2.0**-8 if isa == "avx512_bf16" else 1e-5
        reference, result = self.exact(), from_bf16(y)
        bound = 2.0**-8 * np.abs(reference) + rounding * self.exact(magnitude=True)
        assert np.isfinite(result).all() and (np.abs(result - reference) <= bound).all()


@pytest.mark.few(2)
@pytest.mark.parametrize(("isa", "params"), dealt(TIERS, ATTENTION))
def test_few_tokens_attend_to_what_they_chose(jit: Jit, isa: str, params: Params) -> None:
    need(isa)
    case = Attended(params, PLACES)
    y = case.few(jit, isa, 1)
    case.check(isa, y)
    assert (case.few(jit, isa, 3) == y).all()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("isa", "params", "past", "tokens"), dealt(TIERS, ATTENTION, [(0, 97), (700, 70), (45, 19)])
)
def test_many_tokens_attend_to_what_they_chose(
    jit: Jit, isa: str, params: Params, past: int, tokens: int
) -> None:
    need(isa)
    case = Attended(params, [(0, past + token) for token in range(tokens)])
    y = case.many(jit, isa, 1)
    case.check(isa, y)
    assert (case.many(jit, isa, 3) == y).all()


@pytest.mark.parametrize(
    "wrong", [{"index_block": 5}, {"index_heads": 3}, {"window": 7}], ids=lambda x: next(iter(x))
)
def test_shapes_without_a_kernel_are_refused(jit: Jit, wrong: Params) -> None:
    with pytest.raises(KernelError, match="attention"):
        jit.ir_text(spec_of("attention", "avx2", ATTENTION[0] | wrong))
