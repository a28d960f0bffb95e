"""Dense products in Triton's interpreter, against float64, at sizes that are no multiples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from e5m2 import E5M2_ROWS
from format_rows import BLOCKS, FOUR_BITS, TENSOR, TWICE
from interpreted import error
from triton_weights import random_weight, random_x

from hmc.blocks.pointwise import activated
from hmc.codegen.expr import OPERATIONS, REDUCTIONS
from hmc.codegen.triton import table
from hmc.formats import Format, format_of, registered
from hmc.runtime.device_ops.triton.launch import Terms, Workspace, gate_up, matmul

BOUND = 3e-7
"""Relative error of sums in f32."""
ROUNDED = 3e-3
"""The same of results in bf16."""


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(3, 70, 201), (20, 130, 192)])
def test_fp8_of_few_tokens_and_of_many(
    tokens: int, rows: int, columns: int, work: Workspace
) -> None:
    weight, values = random_weight(format_of("fp8"), rows, columns)
    x = random_x(tokens, columns)
    assert error(matmul(x, weight, work), x.double() @ values.t()) < BOUND


@pytest.mark.few(5)
@pytest.mark.parametrize(
    "row",
    [*map(format_of, ("bf16", "fp16", "f32", "int4", "int4-zero", "nvfp4")), E5M2_ROWS, FOUR_BITS,
     BLOCKS, TENSOR, TWICE],
    ids=lambda row: row.name,
)  # fmt: skip
def test_every_format(row: Format, work: Workspace) -> None:
    with registered(row):
        weight, values = random_weight(row, 70, 160)
    x = random_x(2, 160)
    assert error(matmul(x, weight, work), x.double() @ values.t()) < BOUND


def test_parts_of_sums_are_joined_in_one_order(work: Workspace) -> None:
    # nine steps for four programs: the last one has none
    weight, values = random_weight(format_of("fp8"), 16, 9 * 128 - 5)
    tile = table.tile("linear", 80, 1)
    assert table.parts(tile, 1, weight.columns, 4, False) == 4
    x = random_x(1, weight.columns)
    found = matmul(x, weight, work)
    assert error(found, x.double() @ values.t()) < BOUND
    assert not work.counters.any()
    assert torch.equal(matmul(x, weight, work), found)


def test_bias_and_rounding_and_bands_of_tiles(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = table.Tile(16, 16, 32, 4, 1)
    monkeypatch.setattr(table, "tile", lambda *_: small)
    weight, values = random_weight(format_of("bf16"), 35, 33)
    x, bias = random_x(16 * 9 + 3, 33), random_x(1, 35)[0]
    out = torch.empty(len(x), 35, dtype=torch.bfloat16)
    assert matmul(x, weight, work, out=out, bias=bias) is out
    assert error(out, x.double() @ values.t() + bias.double()) < ROUNDED


@pytest.mark.parametrize("tokens", [2, 18])
def test_the_activation_of_two_products(tokens: int, work: Workspace) -> None:
    row = format_of("fp8")
    (gate, gates), (up, ups) = (random_weight(row, 70, 520, seed) for seed in (0, 1))
    x = random_x(tokens, 520) * 0.01
    found = gate_up(x, gate, up, work)
    wide = x.double()
    exact = torch.nn.functional.silu(wide @ gates.t()) * (wide @ ups.t())
    assert found.dtype == torch.bfloat16
    assert error(found, exact) < ROUNDED
    assert not work.counters.any()


def test_x_as_two_fp8_numbers(work: Workspace) -> None:
    weight, values = random_weight(format_of("fp8"), 70, 320)
    x = random_x(18, 320)
    x[3], x[4] = x[3] * 1e-3, 0
    x[5, 0] = 1e4  # what is far below it in its block loses bits
    terms = Terms.of(x, weight.layout)
    scales = terms.scales.repeat_interleave(128, 1)[:, :320]
    lost = (terms.codes[0].float() + terms.codes[1].float() / 16) * scales - x.float()
    assert lost[5, :128].abs().max() < 1e4 * 2**-20
    lost[5, :128] = 0
    assert not lost.any()
    assert torch.equal(terms.scales, torch.exp2(terms.scales.log2().round()))
    found, exact = matmul(terms, weight, work), x.double() @ values.t()
    assert error(found[5:6], exact[5:6]) < 1e-5
    found[5], exact[5] = 0, 0
    assert error(found, exact) < BOUND
    products = x.double() * 0.01 @ values.t()
    found = gate_up(Terms.of(x * 0.01, weight.layout), weight, weight, work)
    assert error(found, torch.nn.functional.silu(products) * products) < 2 * ROUNDED


_TEXTS = [
    *(f"{name}(gate)" for name, count in OPERATIONS.items() if count == 1
      and name not in {*REDUCTIONS, "neg", "sqrt", "rsqrt"}),
    "sqrt(square(gate)) + 1.5",
    "rsqrt(square(gate) + 0.25)",
    "where(gate < up, -gate, where(up <= 0.0, up, 3.0))",
    "minimum(gate, 7.0) * (maximum(up, -7.0) + 1.0) - gate / (square(up) + 1.0)",
]  # fmt: skip


def test_activations_mean_what_they_do_elsewhere(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = replace(table.tile("pair", 80, 1), rows=16, depth=16)
    monkeypatch.setattr(table, "tile", lambda *_: tile)
    row = format_of("bf16")
    eye, _ = random_weight(row, 16, 16)
    other, _ = random_weight(row, 16, 16)
    eye.planes[0].copy_(torch.eye(16).flatten())
    other.planes[0].copy_(torch.eye(16).flatten() * -0.75)
    x = torch.linspace(-12, 12, 16 * 16).view(16, 16).to(torch.bfloat16)
    for text in _TEXTS:
        found = gate_up(x, eye, other, work, act=text, out=torch.empty(16, 16))
        exact = activated(text, x.double(), x.double() * -0.75)
        assert torch.allclose(found.double(), exact, rtol=2e-6, atol=1e-14), text
