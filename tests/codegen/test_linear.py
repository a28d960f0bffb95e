"""`linear` against float64: every format and tier, odd sizes, exact codes, results that depend on
nothing else.
"""

from __future__ import annotations

import numpy as np
import pytest
from dealt import dealt
from decode_data import address_of_scale, as_multiplied, bound, stored_as, weights
from kernel_calls import address, filled, floats, guarded, in_turn
from kernel_meanings import linear
from prefill_data import Stored, activations, e4m3, from_bf16, need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.native import takes_nan
from hmc.codegen.spec import MAX_TOKENS, KernelSpec, WeightFormat

SIZES: list[tuple[WeightFormat, int, int, int]] = [
    ("fp8", 200, 0, 0),
    ("bf16", 129, 0, 0),
    ("fp16", 100, 0, 0),
    ("f32", 33, 0, 0),
    ("int4", 200, 64, 0),
]
"""Format, K, group, dtype of a scale (its place in `Plane.kept`)."""
MORE: list[tuple[WeightFormat, int, int, int]] = [
    ("fp8", 31, 0, 0),
    ("fp8", 384, 0, 0),
    ("bf16", 7, 0, 0),
    ("bf16", 256, 0, 0),
    ("int4", 64, 128, 1),
    ("int4", 100, 32, 0),
    ("int4", 256, 128, 0),
    ("int4", 384, 32, 1),
]


def spec_of(
    isa: str,
    weight: WeightFormat,
    k: int,
    group: int = 128,
    scale_dtype: int = 0,
    out: str = "f32",
    tokens: int = MAX_TOKENS,
) -> KernelSpec:
    plain = KernelSpec.of("linear", isa, weight=weight, out=out, k=k, tokens=tokens)
    return stored_as(plain, group, scale_dtype)


def run_linear(
    jit: Jit,
    spec: KernelSpec,
    x: np.ndarray,
    matrix: Stored,
    bias: np.ndarray | None = None,
    workers: int = 1,
) -> np.ndarray:
    """y [tokens, rows] as stored."""
    rows = len(matrix.data)
    y = filled((len(x), rows + 3), np.uint16 if spec.out == "bf16" else np.float32)
    in_turn(
        jit, spec, workers, x=address(x), x_stride=x.shape[1], w=address(matrix.data),
        scale=address_of_scale(matrix, spec.weight), bias=address(bias), y=address(y),
        y_stride=rows + 3, rows=rows, tokens=len(x),
    )  # fmt: skip
    assert (y[:, rows:] == 77).all()
    return y[:, :rows]


@pytest.mark.few(7)
@pytest.mark.parametrize(
    ("weight", "k", "group", "bits", "isa"),
    [(*size, isa) for size in SIZES for isa in TIERS] + dealt(MORE, TIERS),
)
def test_linear(jit: Jit, weight: WeightFormat, k: int, group: int, bits: int, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(k)
    spec = spec_of(isa, weight, k, group, bits)
    for rows, tokens in [(1, 1), (3, 2), (7, 16), (130, 5), (130, 3), (257, 1), (257, 8)]:
        matrix = weights(rng, weight, rows, k, group, bits)
        x = guarded(activations(rng, tokens, k, k + 5))
        bias = floats(rng, rows)
        exact_x = as_multiplied(spec, from_bf16(x[:, :k]))
        exact = linear(exact_x, matrix.values, bias.astype(np.float64))
        y = run_linear(jit, spec, x, matrix, bias, workers=2)
        assert (np.abs(y - exact) <= bound(exact_x, matrix.values) + 1e-6 * np.abs(exact)).all()


@pytest.mark.parametrize("isa", TIERS)
def test_bf16_result_without_bias(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(2)
    matrix = weights(rng, "fp8", 530, 129)
    x = guarded(activations(rng, 2, 129, 129))
    exact = from_bf16(x) @ matrix.values.T
    y = from_bf16(
        run_linear(jit, spec_of(isa, "fp8", 129, out="bf16", tokens=2), x, matrix, workers=3)
    )
    assert (np.abs(y - exact) <= 2.0**-8 * np.abs(exact) + bound(from_bf16(x), matrix.values)).all()


@pytest.mark.parametrize("isa", TIERS)
def test_every_fp8_code_is_exact(jit: Jit, isa: str) -> None:
    """One-hot activations pick single codes: finite ones must come out as they are, NaN as NaN
    (where weights are not checked for them).
    """
    need(isa)
    k = 200
    codes = np.zeros((2, k), np.uint8)
    codes[:, :128] = np.arange(256).reshape(2, 128)
    matrix = Stored(guarded(codes), guarded(np.ones((1, 2), np.float32)), e4m3(codes))
    spec = spec_of(isa, "fp8", k)
    finite = guarded(np.where((codes & 127) == 127, 0, codes).astype(np.uint8))
    one_hot = np.where(np.eye(128, k, dtype=bool), 0x3F80, 0).astype(np.uint16)
    plain = Stored(finite, matrix.scale, e4m3(finite))
    y = np.concatenate(
        [run_linear(jit, spec, guarded(one_hot[at : at + 16]), plain) for at in range(0, 128, 16)]
    )
    np.testing.assert_array_equal(y.T, e4m3(finite)[:, :128])
    if not takes_nan(isa, "fp8"):
        assert np.isnan(run_linear(jit, spec, guarded(one_hot[:3]), matrix)).all()


@pytest.mark.parametrize("isa", TIERS)
def test_int4_activations_of_any_size(jit: Jit, isa: str) -> None:
    """Chunks of tiny, huge and no activations; infinities and NaN spoil their own token alone."""
    need(isa)
    rng = np.random.default_rng(8)
    k = 200
    matrix = weights(rng, "int4", 40, k, 64)
    x = activations(rng, 6, k, k)
    sizes = (0x0000, 0x0001, 0x0080, 0x7149)  # 0, a subnormal, the smallest normal, 1e30, signed
    for token, bits in enumerate(sizes):
        x[token, 64:128] = np.where(rng.integers(0, 2, 64), bits, bits | 0x8000)
    x[4, 150], x[5, 7] = 0x7F80, 0x7FC0
    spec = spec_of(isa, "int4", k, 64)
    y = run_linear(jit, spec, guarded(x), matrix)
    exact_x = as_multiplied(spec, from_bf16(x[:4]))
    exact = exact_x @ matrix.values.T
    assert (np.abs(y[:4] - exact) <= bound(exact_x, matrix.values)).all()
    assert not np.isfinite(y[4:]).any()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("weight", "k"), [("fp8", 200), ("bf16", 129), ("int4", 200)])
def test_result_is_the_tokens_own(jit: Jit, isa: str, weight: WeightFormat, k: int) -> None:
    """The same bits alone, in any batch, and from any number of workers."""
    need(isa)
    rng = np.random.default_rng(5)
    spec = spec_of(isa, weight, k, group=64)
    matrix = weights(rng, weight, 150, k, 64)
    x = guarded(activations(rng, 16, k, k))
    whole = run_linear(jit, spec, x, matrix)
    for tokens in range(1, 16):
        part = run_linear(jit, spec, guarded(x[16 - tokens :]), matrix, workers=tokens)
        np.testing.assert_array_equal(part, whole[16 - tokens :])


def test_instructions(jit: Jit) -> None:
    """Each tier uses what it has, and nothing it has not."""
    text = {
        (isa, weight): jit.assembly(spec_of(isa, weight, 256, tokens=1))
        for isa in TIERS
        for weight in ("fp8", "int4")
    }
    best = text["avx512_bf16", "fp8"]
    assert "vdpbf16ps" in best
    assert "vpermi2b" in best or "vpermt2b" in best
    assert "vpternlog" in best
    assert "vpunpcklbw" in best and "vpunpckhbw" in best
    assert "vdpbf16ps" in text["avx512_bf16", "int4"] and "vpermw" in text["avx512_bf16", "int4"]
    for weight in ("fp8", "int4"):
        assert "vdpbf16ps" not in text["avx512", weight]
        assert "zmm" in text["avx512", weight] and "vfmadd" in text["avx512", weight]
        assert "zmm" not in text["avx2", weight] and "vfmadd" in text["avx2", weight]
    for isa in ("avx512", "avx2"):
        assert "vpsraw" in text[isa, "fp8"] and "vcvtph2ps" not in text[isa, "fp8"]
        assert "vpmaddwd" in text[isa, "int4"] and "vcvtdq2ps" in text[isa, "int4"]
