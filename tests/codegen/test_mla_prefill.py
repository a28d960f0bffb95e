"""`mla_prefill` against float64: DeepSeek's widths and odd ones, every format, chunks, workers.

Queries, lifted keys and values are rounded to bf16 on avx512_bf16, as transformers does in BF16:
results lie within the bounds of `attention_prefill` around the exact result over operands so
rounded, and within 6e-3 (relative norm) of that over exact ones.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from attention_options import LATENT, of_heads, option_args, option_spec
from dealt import dealt
from kernel_calls import address, bf16, filled, floats, from_bf16, guarded, in_turn
from kernel_meanings import NO_OPTIONS, Options, attention_prefill, mla_prefill
from paged import Paged
from prefill_data import FORMATS, Stored, as_packed, need, run, stored

from hmc.codegen.isa import TIERS, best_isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.prefill_form import lift_form, prefill_scratch_bytes
from hmc.codegen.spec import WeightFormat

Params = dict[str, int]
DEEPSEEK: Params = {
    "heads": 3, "nope": 128, "rope": 64, "v_dim": 128, "rank": 512, "block": 32
}  # fmt: skip
TINY: Params = {"heads": 4, "nope": 32, "rope": 16, "v_dim": 48, "rank": 64, "block": 7}
RAGGED: Params = {"heads": 5, "nope": 28, "rope": 10, "v_dim": 45, "rank": 202, "block": 10}


class Case:
    """`tokens` queries after `past` positions: the third of three sequences, the rest unseen."""

    def __init__(
        self,
        isa: str,
        weight: WeightFormat,
        params: Params,
        past: int,
        tokens: int,
        options: Options = NO_OPTIONS,
    ) -> None:
        need(isa)
        rng = np.random.default_rng(past + tokens)
        self.params, self.past, self.options = params, past, of_heads(options, params["heads"])
        extra = {"group": 64, "scale_dtype": 0} if weight == "int4" else {}
        self.spec = option_spec("mla_prefill", isa, params | extra, options, weight)
        heads, nope, rope, v_dim, rank = (
            params[name] for name in ("heads", "nope", "rope", "v_dim", "rank")
        )
        w = stored(rng, weight, heads * (nope + v_dim), rank, 64)
        self.w = Stored(guarded(w.data), guarded(w.scale), w.values)
        places = [(s, past + t) for s in (0, 1, 2) for t in range(tokens)]
        paged = Paged.of(rng, params["block"], places)
        paged.positions[: 2 * tokens] = -1  # so that `rows` makes all of them NaN
        self.tables = paged.tables
        _, rows = paged.rows(rng, rank + rope)
        # Lifted keys have a deviation of about one.
        rows[..., :rank] *= 2.0 ** -np.round(np.log2(w.values.std() * rank**0.5))
        self.cache = guarded(bf16(rows))
        self.q = guarded(2 * floats(rng, tokens, heads * (nope + rope) + 3))
        self.scale = (nope + rope) ** -0.5

    def run(self, jit: Jit, workers: int, first: int = 0, stop: int | None = None) -> np.ndarray:
        """y bits [tokens, heads, v_dim] of the chunk [first, stop)."""
        q = guarded(self.q[first:stop])
        tokens, width = len(q), self.params["heads"] * self.params["v_dim"]
        y = filled((tokens, width + 1), np.uint16)
        start = self.past + first
        positions = guarded(np.arange(start, start + tokens, dtype=np.int32))
        sequence = guarded(np.full(tokens, 2, np.int32))
        scratch = guarded(np.full(workers * prefill_scratch_bytes(self.spec), 0xFF, np.uint8))
        in_turn(jit, self.spec, workers, **self.arguments(q, positions, sequence, y, scratch))
        assert (y[:, width:] == 77).all()
        return y[:, :width].reshape(tokens, self.params["heads"], -1)

    def arguments(
        self,
        q: np.ndarray,
        positions: np.ndarray,
        sequence: np.ndarray,
        y: np.ndarray,
        scratch: np.ndarray,
    ) -> dict[str, int | float]:
        """The argument block."""
        return {
            "q": address(q), "q_stride": q.shape[1], "cache": address(self.cache),
            "w": address(self.w.data), "w_scale": address(self.w.scale),
            "tables": address(self.tables), "table_stride": self.tables.shape[1],
            "sequence": address(sequence), "positions": address(positions), "y": address(y),
            "y_stride": y.shape[1], "tokens": len(q), "scale": self.scale,
            "scratch": address(scratch), **option_args("mla_prefill", self.options),
        }  # fmt: skip

    @property
    def queries(self) -> np.ndarray:
        """[tokens, heads, nope + rope]."""
        return self.q[:, :-3].reshape(len(self.q), self.params["heads"], -1)

    @property
    def weights(self) -> np.ndarray:
        """[heads, nope + v_dim, rank]."""
        return self.w.values.reshape(self.params["heads"], -1, self.params["rank"])

    @property
    def seen(self) -> np.ndarray:
        """The cache, with the latents as keys and values are lifted from them."""
        rows, rank = from_bf16(self.cache), self.params["rank"]
        written = np.isfinite(rows[..., :rank]).all(-1)
        rows[written, :rank] = as_packed(lift_form(self.spec).spec, rows[written, :rank])
        return rows

    def exact(self) -> np.ndarray:
        """The float64 result."""
        return mla_prefill(
            self.queries, self.seen, self.weights, self.tables[2], self.past,
            self.scale, self.params["rope"], self.options,
        )  # fmt: skip

    def rounded(self) -> tuple[np.ndarray, np.ndarray]:
        """The same over queries, keys and values rounded to bf16, and sum p |v|."""
        nope, rank, heads = (self.params[name] for name in ("nope", "rank", "heads"))
        rows = self.seen
        with np.errstate(invalid="ignore"):
            lifted = np.einsum("nbr,hdr->nhbd", rows[..., :rank], self.weights)
            lifted = from_bf16(bf16(lifted))
        shared = np.repeat(rows[:, None, :, rank:], heads, 1)
        keys, values = np.concatenate([lifted[..., :nope], shared], -1), lifted[..., nope:]
        factor = np.float32(self.scale) * np.float32(np.log2(np.e))
        grown = [self.options.factor(self.past + t) for t in range(len(self.q))]
        queries = self.queries * (factor * np.float32(grown))[:, None, None]
        queries = from_bf16(bf16(queries))  # scores are exponents of 2
        where = (self.tables[2], self.past, np.log(2), Options(sinks=self.options.sinks))
        return (
            attention_prefill(queries, keys, values, *where),
            attention_prefill(queries, keys, np.abs(values), *where),
        )

    def check(self, y: np.ndarray) -> None:
        """Assert that `y` is within the bounds of rounding."""
        result, exact = from_bf16(y), self.exact()
        assert np.isfinite(result).all()
        is_dot = self.spec.isa == "avx512_bf16"
        rounded, magnitude = self.rounded()
        reference = rounded if is_dot else exact
        bound = 2.0**-8 * np.abs(reference) + (2.0**-8 if is_dot else 2e-5) * magnitude
        assert (np.abs(result - reference) <= bound).all()
        for other, most in ((reference, 2.2e-3), (exact, 6e-3)):
            error = np.linalg.norm(result - other) / np.linalg.norm(other)
            assert error < most, error


@pytest.mark.few(2)
@pytest.mark.parametrize(("weight", "isa"), dealt(FORMATS, TIERS))
def test_tiny(jit: Jit, weight: WeightFormat, isa: str) -> None:
    for past, tokens in ((0, 1), (0, 97), (45, 19), (191, 70)):
        case = Case(isa, weight, TINY, past, tokens)
        y = case.run(jit, 1)
        case.check(y)
        for workers in (2, 3, 7):
            assert (case.run(jit, workers) == y).all()


@pytest.mark.few(2)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("weight", ["fp8", "bf16"])
def test_ragged(jit: Jit, isa: str, weight: WeightFormat) -> None:
    """Heads are no whole vectors: one vector of rows has scales of two blocks."""
    for past, tokens in ((0, 33), (200, 50)):
        case = Case(isa, weight, RAGGED, past, tokens)
        y = case.run(jit, 1)
        case.check(y)
        assert (case.run(jit, 4) == y).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", TIERS)
def test_options(jit: Jit, isa: str) -> None:
    case = Case(isa, "bf16", TINY, 45, 60, LATENT)
    case.check(case.run(jit, 2))


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("weight", ["fp8", pytest.param("bf16", marks=pytest.mark.slow)])
def test_deepseek(jit: Jit, isa: str, weight: WeightFormat) -> None:
    """Many keys, and chunks cut anywhere give the bits of the whole."""
    case = Case(isa, weight, DEEPSEEK, 331, 250)
    whole = case.run(jit, 2)
    case.check(whole)
    assert (case.run(jit, 16) == whole).all()
    parts = [case.run(jit, 2, *cut) for cut in pairwise((0, 1, 64, 163, 250))]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("sizes", [{"nope": 24}, {"v_dim": 40}, {"nope": 25, "rope": 3}])
def test_odd_heads(jit: Jit, sizes: dict[str, int]) -> None:
    case = Case(best_isa().name, "fp8", TINY | sizes, 45, 19)
    case.check(case.run(jit, 2))


def test_a_rank_that_leaves_room_for_few_positions(jit: Jit) -> None:
    case = Case("avx2", "f32", TINY | {"heads": 1, "rank": 2600}, 150, 40)
    assert lift_form(case.spec).block < 192
    case.check(case.run(jit, 1))


@pytest.mark.slow
def test_more_tokens_than_a_unit_holds(jit: Jit) -> None:
    case = Case(next(iter(TIERS)), "fp8", TINY | {"heads": 2}, 5, 2100)
    y = case.run(jit, 1)
    case.check(y)
    assert (case.run(jit, 2) == y).all()


def test_workers_at_once(jit: Jit) -> None:
    """Threads share nothing but the operands: each writes its own units and scratch."""
    case = Case(next(iter(TIERS)), "fp8", DEEPSEEK, 10, 150)
    alone = case.run(jit, 1)
    y = np.zeros((150, 3 * 128), np.uint16)
    positions, sequence = np.arange(10, 160, dtype=np.int32), np.full(150, 2, np.int32)
    scratch = np.zeros(4 * prefill_scratch_bytes(case.spec), np.uint8)
    run(jit, case.spec, 4, **case.arguments(case.q, positions, sequence, y, scratch))
    assert (y.reshape(alone.shape) == alone).all()
