"""`gemm` against float64, in every tier and format, at odd sizes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from dealt import dealt
from kernel_meanings import linear
from prefill_data import (
    FORMATS,
    Stored,
    activations,
    address,
    as_packed,
    before_a_hole,
    bf16,
    from_bf16,
    groups,
    need,
    run,
    stored,
)

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.native import takes_nan
from hmc.codegen.panel.tiling import Form, panel_scratch_bytes
from hmc.codegen.spec import KernelSpec, WeightFormat


def call(
    jit: Jit,
    spec: KernelSpec,
    x: np.ndarray,
    w: Stored,
    rows: int,
    tokens: int,
    workers: int = 1,
    bias: np.ndarray | None = None,
    gather: np.ndarray | None = None,
) -> np.ndarray:
    """y of `gemm` as stored; checks that columns past `rows` stay untouched."""
    bits = spec.out == "bf16"
    y = np.full((tokens, rows + 3), 77, np.uint16 if bits else np.float32)
    scratch = np.full(workers * panel_scratch_bytes(spec), 0xFF, np.uint8)
    run(
        jit, spec, workers, x=address(x), x_stride=x.shape[1], gather=address(gather),
        w=address(w.data), scale=address(w.scale), bias=address(bias), y=address(y),
        y_stride=rows + 3, rows=rows, tokens=tokens, scratch=address(scratch),
    )  # fmt: skip
    assert (y[:, rows:] == 77).all()
    return y[:, :rows]


@pytest.mark.few(3)
@pytest.mark.parametrize(("isa", "weight", "k"), dealt(TIERS, FORMATS, [7, 100, 128, 200, 384]))
def test_every_format_and_tier_at_odd_sizes(
    jit: Jit, isa: str, weight: WeightFormat, k: int
) -> None:
    """Nothing past the last row is read: a page that faults begins there."""
    need(isa)
    rng = np.random.default_rng(k)
    spec = KernelSpec.of("gemm", isa, weight=weight, k=k, **groups(weight, 32), tile={"tokens": 5})
    for rows, tokens in ((1, 1), (7, 64), (16, 17), (33, 2), (130, 130)):
        w = stored(rng, weight, rows, k, group=32)
        edge = Stored(before_a_hole(w.data), before_a_hole(w.scale), w.values)
        x = before_a_hole(activations(rng, tokens, k, k + 5 * (tokens > 2)))
        y = call(jit, spec, x, edge, rows, tokens)
        seen = as_packed(spec, from_bf16(x[:, :k]))
        exact = linear(seen, w.values)
        bound = linear(np.abs(seen), np.abs(w.values))
        assert (np.abs(y - exact) <= 2e-6 * bound + 1e-30).all()


@pytest.mark.parametrize(("isa", "weight"), dealt(TIERS, ["fp8", "bf16", "int4"]))
def test_workers_tiles_and_neighbours_change_no_bit(
    jit: Jit, isa: str, weight: WeightFormat
) -> None:
    need(isa)
    rng = np.random.default_rng(1)
    rows, tokens, k = 130, 61, 384
    w = stored(rng, weight, rows, k)
    x = activations(rng, tokens, k, k)
    spec = KernelSpec.of("gemm", isa, weight=weight, k=k, **groups(weight, 128))
    alone = call(jit, spec, x, w, rows, tokens)
    for workers in (2, 3, 7):
        assert np.array_equal(call(jit, spec, x, w, rows, tokens, workers), alone)
    assert np.array_equal(call(jit, spec, x[5:6], w, rows, 1), alone[5:6])
    small = KernelSpec.of(
        "gemm", isa, weight=weight, k=k, **groups(weight, 128), tile={"tokens": 5}
    )
    assert np.array_equal(call(jit, small, x, w, rows, tokens), alone)


@pytest.mark.few(2)
@pytest.mark.parametrize("isa", TIERS)
def test_gather_bias_and_bf16_result(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(2)
    rows, k = 43, 136
    w = stored(rng, "bf16", rows, k)
    x = activations(rng, 9, k, k)
    gather = np.array([8, 0, 0, 3, 7], np.int32)
    bias = rng.standard_normal(rows).astype(np.float32)
    spec = KernelSpec.of("gemm", isa, weight="bf16", out="f32", k=k)
    y = call(jit, spec, x, w, rows, 5, bias=bias, gather=gather)
    exact = linear(from_bf16(x), w.values, bias.astype(np.float64), gather)
    assert np.allclose(y, exact, rtol=0, atol=2e-5)
    rounded = KernelSpec.of("gemm", isa, weight="bf16", out="bf16", k=k)
    assert np.array_equal(call(jit, rounded, x, w, rows, 5, bias=bias, gather=gather), bf16(y))


@pytest.mark.parametrize("isa", TIERS)
def test_every_fp8_code_is_exact(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(3)
    w = stored(rng, "fp8", 256, 130)
    w.data[:] = np.arange(256, dtype=np.uint8)[:, None]
    w.scale[:] = 1
    one_hot = np.zeros((3, 130), np.uint16)
    one_hot[0, 0] = one_hot[1, 63] = one_hot[2, 129] = 0x3F80
    spec = KernelSpec.of("gemm", isa, weight="fp8", k=130)
    y = call(jit, spec, one_hot, w, 256, 3)
    code = np.arange(256)
    sign = np.where(code & 128, -1.0, 1.0)
    e, m = (code >> 3) & 15, code & 7
    value = sign * np.where(e > 0, (1 + m / 8) * 2.0 ** (e - 7.0), m / 8 * 2.0**-6)
    finite = (code & 127) != 127
    assert np.array_equal(y[:, finite], np.tile(value[finite], (3, 1)))
    if not takes_nan(isa, "fp8"):
        assert np.isnan(y[:, ~finite]).all()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("group", "scale_dtype", "isa"),
    dealt([(32, 1), (64, 0), (128, 0), (128, 1)], ["avx512_bf16", "avx2"]),
)
def test_int4_groups_and_scales(jit: Jit, group: int, scale_dtype: int, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(group)
    w = stored(rng, "int4", 40, 256, group, scale_dtype)
    x = activations(rng, 14, 256, 256)
    spec = KernelSpec.of("gemm", isa, weight="int4", k=256, group=group, scale_dtype=scale_dtype)
    exact = linear(as_packed(spec, from_bf16(x)), w.values)
    assert np.allclose(call(jit, spec, x, w, 40, 14), exact, rtol=1e-5, atol=1e-3)


def test_many_tokens_take_several_blocks(jit: Jit) -> None:
    need("avx512_bf16")
    rng = np.random.default_rng(4)
    spec = KernelSpec.of("gemm", "avx512_bf16", weight="fp8", k=256, tile={"x_bytes": 1 << 15})
    w, x = stored(rng, "fp8", 96, 256), activations(rng, 333, 256, 256)
    exact = linear(from_bf16(x), w.values)
    for workers in (1, 2):
        y = call(jit, spec, x, w, 96, 333, workers)
        assert np.abs(y - exact).max() <= 1e-6 * np.abs(exact).max() * 16


def test_assembly_of_the_dot_form(jit: Jit) -> None:
    text = jit.assembly(KernelSpec.of("gemm", "avx512_bf16", weight="fp8", k=2048))
    tile = text[text.index("\ntile12:") : text.index("\nmultiply:")]
    # 24 sums stay in registers: a dot product never meets memory, and nothing is spilled.
    assert len(re.findall(r"vdpbf16ps\t%zmm\d+, %zmm\d+, %zmm\d+", tile)) >= 4 * 24
    assert "(%rsp)" not in tile[tile.index("vdpbf16ps") : tile.rindex("vdpbf16ps")]
    decode = text[text.index("\ndecode128:") :]
    assert "vpermi2b" in decode or "vpermt2b" in decode
    assert "vpunpcklwd" in decode


@pytest.mark.parametrize(("isa", "register"), [("avx512", "zmm"), ("avx2", "ymm")])
def test_assembly_of_the_fma_form(jit: Jit, isa: str, register: str) -> None:
    text = jit.assembly(KernelSpec.of("gemm", isa, weight="fp8", k=2048))
    assert "vdpbf16ps" not in text
    assert re.search(rf"vfmadd\w+\t.*%{register}", text)
    assert "vpsraw" in text and "vcvtph2ps" not in text


@pytest.mark.parametrize(("isa", "register", "spills"), [("avx512", "zmm", 24), ("avx2", "ymm", 0)])
def test_assembly_of_the_whole_form(jit: Jit, isa: str, register: str, spills: int) -> None:
    spec = KernelSpec.of("gemm", isa, weight="int4", k=2048, group=128, scale_dtype=0)
    text = jit.assembly(spec)
    most = Form.of(spec).tile
    tile = text[text.index(f"\ntile{most}:") : text.index("\nmultiply:")]
    first, last = tile.index("vpmaddwd"), tile.rindex("vpmaddwd")
    assert len(re.findall(rf"vpmaddwd\t.*%{register}", tile)) == 4 * 2 * most
    assert tile[first:last].count("(%rsp)") <= spills  # the sums stay in registers
