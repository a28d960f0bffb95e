"""Kernels that are made from a format's planes, against its meaning in numpy: every matmul, odd
sizes, on the smallest tier and this machine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from format_rows import BLOCKS, E5M2_ROWS, FOUR_BITS, ROWS, TENSOR, Made, made
from kernel_calls import address, filled, guarded, in_turn
from kernel_meanings import mla_absorb
from prefill_data import activations, from_bf16

from hmc.codegen.checks import check_spec
from hmc.codegen.expr import SWIGLU
from hmc.codegen.isa import best_isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.prefill_form import prefill_scratch_bytes
from hmc.codegen.kernels.matmul.experts import scratch_bytes
from hmc.codegen.native import is_native
from hmc.codegen.panel.tiling import panel_scratch_bytes
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError
from hmc.formats import Format, registered

ISAS = sorted({"avx2", best_isa().name})
CASES = [(E5M2_ROWS, 100, 0), (FOUR_BITS, 96, 32), (BLOCKS, 200, 0), (TENSOR, 33, 0)]


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """The formats of tests are formats."""
    with registered(*ROWS):
        yield


def spec_of(
    op: str, isa: str, row: Format, weight: Made, out: str = "f32", **sizes: int
) -> KernelSpec:
    params = tuple(sorted((sizes | weight.params).items()))
    expr = SWIGLU if op == "gate_up" else ""
    spec = replace(KernelSpec.of(op, isa, weight=row.name, out=out, expr=expr), params=params)
    check_spec(spec)
    assert not is_native(isa, row.name)
    return spec


def pages(weight: Made) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, each before an unreadable page."""
    codes, scale = (guarded(plane) for plane in weight.planes)
    return codes, scale


def close(found: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    limit = 2e-6 * (np.abs(x) @ np.abs(w).T) + 1e-30
    assert (np.abs(found - x @ w.T) <= limit).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("row", "k", "group"), CASES)
def test_linear(jit: Jit, isa: str, row: Format, k: int, group: int) -> None:
    rng = np.random.default_rng(k)
    for rows, tokens in ((131, 1), (7, 16), (65, 3)):
        weight = made(rng, row, rows, k, group)
        codes, scale = pages(weight)
        x, y = guarded(activations(rng, tokens, k, k)), filled((tokens, rows), np.float32)
        in_turn(
            jit, spec_of("linear", isa, row, weight, k=k, tokens=16), 2, x=address(x),
            x_stride=k, w=address(codes), scale=address(scale), bias=0, y=address(y),
            y_stride=rows, rows=rows, tokens=tokens,
        )  # fmt: skip
        close(y, from_bf16(x), weight.values.astype(np.float64))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("row", "k", "group"), CASES)
def test_gemm(jit: Jit, isa: str, row: Format, k: int, group: int) -> None:
    rng = np.random.default_rng(k)
    rows, tokens = 70, 37
    weight = made(rng, row, rows, k, group)
    codes, scale = pages(weight)
    spec = spec_of("gemm", isa, row, weight, k=k)
    x, y = guarded(activations(rng, tokens, k, k)), filled((tokens, rows), np.float32)
    scratch = np.zeros(2 * panel_scratch_bytes(spec), np.uint8)
    in_turn(
        jit, spec, 2, x=address(x), x_stride=k, gather=0, w=address(codes), scale=address(scale),
        bias=0, y=address(y), y_stride=rows, rows=rows, tokens=tokens, scratch=address(scratch),
    )  # fmt: skip
    close(y, from_bf16(x), weight.values.astype(np.float64))


def _silu_mul(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    value = x @ gate.T
    result: np.ndarray = value / (1 + np.exp(-value)) * (x @ up.T)
    return result


@pytest.mark.parametrize("isa", ISAS)
def test_gate_up(jit: Jit, isa: str) -> None:
    rng = np.random.default_rng(3)
    rows, k, tokens = 50, 70, 5
    gate, up = (made(rng, E5M2_ROWS, rows, k) for _ in range(2))
    small = [each.values.astype(np.float64) / 1e3 for each in (gate, up)]
    parts = [(pages(each)[0], guarded(each.planes[1] / np.float32(1e3))) for each in (gate, up)]
    x, y = guarded(activations(rng, tokens, k, k)), filled((tokens, rows), np.uint16)
    spec = spec_of("gate_up", isa, E5M2_ROWS, gate, "bf16", k=k, tokens=16)
    in_turn(
        jit, spec, 1, x=address(x), x_stride=k, gate=address(parts[0][0]),
        gate_scale=address(parts[0][1]), up=address(parts[1][0]), up_scale=address(parts[1][1]),
        y=address(y), y_stride=rows, rows=rows, tokens=tokens,
    )  # fmt: skip
    expected = _silu_mul(from_bf16(x), *small)
    np.testing.assert_allclose(from_bf16(y), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_experts(jit: Jit, isa: str, tokens: int) -> None:
    """Both halves, by the kernels of few tokens and of many."""
    rng = np.random.default_rng(5)
    k, n, experts, top_k = 65, 48, 3, 2
    down = [made(rng, E5M2_ROWS, k, n) for _ in range(experts)]
    kept = [pages(each) for each in down]
    table = np.zeros((experts, 6), np.int64)
    for number, (codes, scale) in enumerate(kept):
        table[number, 4:] = address(codes), address(scale)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    routing = rng.uniform(0.1, 1, (tokens, top_k)).astype(np.float32)
    act = guarded(activations(rng, tokens * top_k, n, n))
    y = np.zeros((tokens, k), np.float32)
    sizes = {"k": n, "n": k, "top_k": top_k, "experts": experts}
    common = {"act": address(act), "routing": address(routing), "table": address(table),
              "y": address(y), "y_stride": k, "tokens": tokens}  # fmt: skip
    if tokens <= 16:
        spec = spec_of("experts_down", isa, E5M2_ROWS, down[0], tokens=16, **sizes)
        scratch = np.zeros(scratch_bytes(spec), np.uint8)
        in_turn(jit, spec, 1, ids=address(ids), scratch=address(scratch), **common)
    else:
        spec = spec_of("grouped_down", isa, E5M2_ROWS, down[0], **sizes)
        scratch = np.zeros(panel_scratch_bytes(spec), np.uint8)
        slots = np.argsort(ids.reshape(-1), kind="stable").astype(np.int32)
        counts = np.bincount(ids.reshape(-1), minlength=experts)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        in_turn(
            jit, spec, 1, slots=address(slots), offsets=address(offsets),
            scratch=address(scratch), **common,
        )  # fmt: skip
    values = from_bf16(act).reshape(tokens, top_k, n)
    expected = np.zeros((tokens, k))
    for t in range(tokens):
        for j in range(top_k):
            expected[t] += routing[t, j] * (
                down[ids[t, j]].values.astype(np.float64) @ values[t, j]
            )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("row", "group"), [(E5M2_ROWS, 0), (FOUR_BITS, 16), (BLOCKS, 0)])
def test_latent_queries(jit: Jit, isa: str, row: Format, group: int) -> None:
    """`mla_absorb`, and that the other kernels of latent attention are built."""
    rng = np.random.default_rng(7)
    heads, nope, rope, v_dim, rank, tokens = 2, 13, 6, 10, 80, 3
    weight = made(rng, row, heads * (nope + v_dim), rank, group)
    codes, scale = pages(weight)
    sizes = {"heads": heads, "nope": nope, "rope": rope, "v_dim": v_dim, "rank": rank, "block": 16}
    q = guarded(rng.standard_normal((tokens, heads, nope + rope), dtype=np.float32))
    latent = filled((tokens, heads, rank), np.float32)
    spec = spec_of("mla_absorb", isa, row, weight, tokens=16, **sizes)
    in_turn(
        jit, spec, 2, q=address(q), q_stride=heads * (nope + rope), w=address(codes),
        scale=address(scale), q_latent=address(latent), tokens=tokens,
    )  # fmt: skip
    w = weight.values.astype(np.float64).reshape(heads, nope + v_dim, rank)
    expected = mla_absorb(q, w, nope)
    limit = 2e-6 * mla_absorb(np.abs(q), np.abs(w), nope) + 1e-30
    assert (np.abs(latent - expected) <= limit).all()
    jit.get(spec_of("mla_up", isa, row, weight, "bf16", tokens=16, **sizes))
    even = sizes | {"nope": 14}
    assert prefill_scratch_bytes(spec_of("mla_prefill", isa, row, weight, "bf16", **even)) > 0


def test_planes_that_no_decoder_can_be_made_for() -> None:
    weight = Made((), np.zeros((1, 1), np.float32), {"group": 24})
    with pytest.raises(KernelError, match="24 columns of a scale are no whole vectors"):
        spec_of("linear", "avx512", FOUR_BITS, weight, k=48, tokens=1)
