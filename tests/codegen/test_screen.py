"""A screened matmul: bounds hold for what kernels really compute, rows that may be among the best
are the whole matrix's to the bit, and no other is missing; over random and adversarial matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from kernel_calls import address, as_format, bf16, filled, from_bf16, guarded, in_turn
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.matmul.screen import COUNTS, PADDED, TOP
from hmc.codegen.kernels.routing.threshold import LEAST
from hmc.codegen.spec import KernelSpec
from hmc.ops.screen import COMPACT, GROUP, copy_kernel

Rows = np.ndarray
TOKENS, WIDTH = 3, 160
"""Most tokens of a call, and columns of quick tests: kernels of few tokens are built quickly."""


@dataclass
class Screened:
    """A matrix [n, k] in a plain format, and what lies beside it."""

    jit: Jit
    isa: str
    form: str
    data: Rows
    values: Rows
    codes: Rows
    scales: Rows
    norms: Rows

    @staticmethod
    def of(jit: Jit, isa: str, form: str, values: Rows, workers: int = 2) -> Screened:
        data, exact = as_format(values, form)
        n, k = values.shape
        codes, norms = filled((n, k), np.int8), filled((n,), np.float32)
        scales = filled((n, k // GROUP), np.uint16)
        in_turn(
            jit, copy_kernel(isa, form, k), workers, w=address(data), rows=n,
            codes=address(codes), scales=address(scales), norms=address(norms),
        )  # fmt: skip
        return Screened(jit, isa, form, data, exact, codes, scales, norms)

    @property
    def copy(self) -> Rows:
        """What the compact copy is worth, f64 [n, k]."""
        n, k = self.codes.shape
        scales = from_bf16(self.scales).astype(np.float64)
        with np.errstate(invalid="ignore"):
            return (self.codes.reshape(n, -1, GROUP) * scales[..., None]).reshape(n, k)

    def _linear(self, op: str, weight: str, x: Rows, w: Rows, scale: Rows | None) -> Rows:
        n, k = self.codes.shape
        groups = {"group": GROUP, "scale_dtype": 0} if scale is not None else {}
        spec = KernelSpec.of(op, self.isa, weight=weight, k=k, tokens=TOKENS, **groups)
        y = filled((len(x), n), np.float32)
        in_turn(
            self.jit, spec, 2, x=address(x), x_stride=k, w=address(w), scale=address(scale),
            bias=0, y=address(y), y_stride=n, rows=n, tokens=len(x),
        )  # fmt: skip
        return y

    def whole(self, x: Rows) -> Rows:
        """What `linear` makes of bf16 x [tokens, k]."""
        return self._linear("linear", self.form, x, self.data, None)

    def compact(self, x: Rows) -> Rows:
        """What its compact copy gives."""
        return self._linear("screen", COMPACT, x, self.codes, self.scales)

    def best(self, x: Rows, best: list[int], workers: int = 3) -> tuple[Rows, Rows]:
        """The best of each token, -inf for the others; rows computed and blocks read whole."""
        n, k = self.codes.shape
        y, stride = self.compact(x), -(-n // TOP // PADDED) * PADDED + PADDED
        tops = guarded(np.full((len(x), stride), LEAST, np.int32))
        counts = guarded(np.zeros((workers, COUNTS), np.int64))
        asked = guarded(np.array(best, np.int32))
        given = {
            "x": address(x), "x_stride": k, "y": address(y), "y_stride": n, "rows": n,
            "norms": address(self.norms), "tops": address(tops), "tops_stride": stride,
            "tokens": len(x),
        }  # fmt: skip
        spec = KernelSpec.of("screen_tops", self.isa, k=k, tokens=TOKENS)
        in_turn(self.jit, spec, workers, **given)
        spec = KernelSpec.of("screen_rows", self.isa, weight=self.form, k=k, tokens=TOKENS)
        more = {"w": address(self.data), "scale": 0, "best": address(asked)}
        in_turn(self.jit, spec, workers, counts=address(counts), **given, **more)
        return y, counts[:, :2].sum(axis=0)

    def check(self, x: Rows, best: list[int]) -> np.ndarray:
        """The best rows are there to the bit, and what is there is exact; what it took."""
        full = self.whole(x)
        y, counts = self.best(x, best)
        same = (y.view(np.uint32) == full.view(np.uint32)) | (np.isnan(y) & np.isnan(full))
        assert (y[~same] == -np.inf).all()
        for row, exact, count in zip(same, full, best, strict=True):
            known = exact[~np.isnan(exact)]
            kth = np.sort(known)[-min(count, len(known))] if len(known) else np.inf
            assert row[(exact >= kth) | np.isnan(exact)].all()
        return counts


def normal(rng: np.random.Generator, n: int, k: int) -> Rows:
    return rng.standard_normal((n, k)) * 0.02


def wild(rng: np.random.Generator, n: int, k: int) -> Rows:
    """Rows and columns of very unlike sizes, and groups of zeros."""
    rows, columns = (10.0 ** rng.uniform(-6, 3, size) for size in (n, k))
    found = rng.standard_normal((n, k)) * rows[:, None] * columns
    found[:, : GROUP * (k // GROUP // 2)] *= rng.integers(0, 2, (n, 1))
    return found


def alike(rng: np.random.Generator, n: int, k: int) -> Rows:
    """A few rows over and over: every best one has equals."""
    return normal(rng, 5, k)[rng.integers(0, 5, n)]


def near(rng: np.random.Generator, n: int, k: int) -> Rows:
    """One row with a last bit changed here and there: results differ by roundings alone."""
    bits = bf16(np.repeat(normal(rng, 1, k), n, axis=0))
    return from_bf16(bits ^ (rng.random((n, k)) < 0.02)).astype(np.float64)


def flipped(rng: np.random.Generator, n: int, k: int) -> Rows:
    """Sums of large terms that cancel: the errors of sums are what decides."""
    found = rng.standard_normal((n, k))
    found[:, 1::2] = -found[:, ::2] + 1e-3 * rng.standard_normal((n, k // 2))
    return found


def halfway(rng: np.random.Generator, n: int, k: int) -> Rows:
    """Every weight as far from its code as it can be."""
    found = (rng.integers(-126, 126, (n, k)) + 0.5) / 127
    found[:, ::GROUP] = 1
    return found


def tiny(rng: np.random.Generator, n: int, k: int) -> Rows:
    """Down to subnormal numbers."""
    return rng.standard_normal((n, k)) * 10.0 ** rng.uniform(-42, -30, (n, 1))


def huge(rng: np.random.Generator, n: int, k: int) -> Rows:
    """Sums of squares overflow, sums may."""
    return rng.standard_normal((n, k)) * 10.0 ** rng.uniform(15, 37, (n, 1))


MATRICES: list[Callable[[np.random.Generator, int, int], Rows]] = [
    normal, wild, alike, near, flipped, halfway, tiny, huge,
]  # fmt: skip
FORMATS = ["bf16", "fp16", "f32"]


def activations(rng: np.random.Generator, tokens: int, matrix: Rows) -> Rows:
    """bf16 rows: normal, of unlike sizes, along a row of the matrix, one column alone."""
    k = matrix.shape[1]
    kinds: list[Callable[[], Rows]] = [
        lambda: rng.standard_normal(k),
        lambda: rng.standard_normal(k) * 10.0 ** rng.uniform(-4, 4, k),
        lambda: matrix[rng.integers(len(matrix))] / max(np.abs(matrix).max(), 1e-30),
        lambda: np.where(np.arange(k) == rng.integers(k), rng.standard_normal(k), 0),
        lambda: rng.standard_normal(k) * 1e-41,
        lambda: np.tile([1.0, 1.0 + 2.0**-7], k // 2),
    ]
    return guarded(bf16(np.stack([kinds[rng.integers(len(kinds))]() for _ in range(tokens)])))


def cases(count: int, widths: list[int]) -> Iterator[tuple[np.random.Generator, Rows]]:
    """Generators and matrices, of every kind in turn."""
    for number in range(count):
        rng = np.random.default_rng(number)
        n, k = int(rng.integers(1, 900)), int(rng.choice(widths))
        yield rng, MATRICES[number % len(MATRICES)](rng, n, k)


def search(jit: Jit, isa: str, form: str, widths: list[int], matrices: int, turns: int) -> int:
    """Check `turns` calls of every one of so many matrices; how many tokens were checked."""
    checked = 0
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for rng, values in cases(matrices, widths):
            limit = 6e4 if form == "fp16" else 3e38
            screened = Screened.of(jit, isa, form, np.clip(values, -limit, limit))
            for _ in range(turns):
                tokens = int(rng.integers(1, TOKENS + 1))
                x = activations(rng, tokens, values)
                best = [int(rng.choice([1, 1, 1, 2, 5, 40, 256])) for _ in range(tokens)]
                screened.check(x, best)
                checked += tokens
    return checked


@pytest.mark.parametrize("isa", TIERS)
def test_what_is_best_is_there_to_the_bit(jit: Jit, isa: str) -> None:
    need(isa)
    assert search(jit, isa, "bf16", [WIDTH], len(MATRICES), 6) >= 6 * len(MATRICES)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("isa", TIERS)
def test_ten_thousand_rows(jit: Jit, isa: str, form: str) -> None:
    need(isa)
    assert search(jit, isa, form, [32, 96, 512], 15 * len(MATRICES), 50) >= 10_000


@pytest.mark.few(2)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("form", FORMATS)
def test_bounds_hold(jit: Jit, isa: str, form: str) -> None:
    """The norm is no less than the residual's, and no product is farther from the copy's than the
    norm says; it is not much larger either."""
    need(isa)
    rng = np.random.default_rng(3)
    for make in (normal, flipped, halfway, wild):
        values = np.clip(make(rng, 70, WIDTH), -6e4, 6e4)
        screened = Screened.of(jit, isa, form, values)
        residual = np.linalg.norm(screened.values - screened.copy, axis=1)
        assert (np.abs(screened.codes.astype(int)) <= 127).all()
        assert (screened.norms >= residual).all()
        size = np.linalg.norm(screened.values, axis=1)
        assert (screened.norms <= 1.01 * residual + 6e-4 * size + 1e-14).all()
        x = guarded(bf16(rng.standard_normal((TOKENS, WIDTH))))
        length = np.linalg.norm(from_bf16(x).astype(np.float64), axis=1)
        off = np.abs(screened.whole(x).astype(np.float64) - screened.compact(x))
        assert (off <= length[:, None] * screened.norms).all()


@pytest.mark.parametrize("isa", TIERS)
def test_what_is_not_finite_is_computed(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(4)
    values = normal(rng, 300, WIDTH)
    values[17, 5], values[130, 9], values[131, 159] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        screened = Screened.of(jit, isa, "bf16", values)
    x = bf16(rng.standard_normal((2, WIDTH)))
    y, _ = screened.best(guarded(x), [1, 3])
    full = screened.whole(guarded(x))
    for row in (17, 130, 131):
        np.testing.assert_array_equal(y[:, row], full[:, row])
    x[1, 3] = 0x7FC0
    y, _ = screened.best(guarded(x), [1, 1])
    assert np.isnan(y[1]).all() and np.isfinite(np.delete(y[0], [17, 130, 131])).all()


@pytest.mark.parametrize("isa", TIERS)
def test_few_rows_are_computed_and_blocks_of_many_whole(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(5)
    screened = Screened.of(jit, isa, "bf16", normal(rng, 2000, WIDTH))
    x = guarded(bf16(rng.standard_normal((3, WIDTH))))
    rows, blocks = screened.check(x, [1] * 3)
    assert 3 <= rows <= 80 and blocks == 0
    rows, blocks = screened.check(x, [1, 1, 200])
    assert rows == 2000 and blocks > 0
    counted = [screened.best(x, [1] * 3, workers)[1].tolist() for workers in (1, 2, 7)]
    assert counted == counted[:1] * 3


def test_nothing_is_done_for_no_tokens(jit: Jit) -> None:
    need("avx2")
    screened = Screened.of(jit, "avx2", "bf16", normal(np.random.default_rng(6), 700, WIDTH))
    y, counts = screened.best(np.zeros((0, WIDTH), np.uint16), [])
    assert y.size == 0 and not counts.any()
