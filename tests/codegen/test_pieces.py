"""Kernels that work in pieces: any pieces together make the bits of the whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernel_calls import address, filled, guarded, in_turn
from prefill_data import activations, need
from test_experts import FORMATS, TOKENS, TOP_K, Layer

from hmc.codegen.arguments import pack
from hmc.codegen.expr import SWIGLU
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.matmul.experts import scratch_bytes
from hmc.codegen.spec import KernelSpec

PIECES = [(0, 5), (7, 1), (5, 2), (8, 3), (11, 1)]
"""First and span, of 12, in an odd order."""


def in_pieces(jit: Jit, spec: KernelSpec, **values: int | float) -> None:
    """Each of `PIECES` in a call of its own."""
    kernel, block = jit.get(spec), pack(spec.op, **values)
    for first, span in PIECES:
        kernel(block, first, 12, span)


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_pieces_make_the_whole(jit: Jit, isa: str, tokens: int) -> None:
    need(isa)
    layer = Layer(isa, *FORMATS[0])
    x = guarded(activations(layer.rng, TOKENS, layer.hidden, layer.hidden))
    ids = layer.choose(tokens)
    routing = guarded(layer.rng.standard_normal((tokens, TOP_K), dtype=np.float32))
    scratch = guarded(np.zeros(scratch_bytes(layer.second), np.uint8))
    gate, up, _ = layer.experts[0]
    linear = KernelSpec.of("linear", isa, weight="fp8", k=layer.hidden, tokens=TOKENS)
    gated = KernelSpec.of(
        "gate_up", isa, weight="fp8", out="bf16", k=layer.hidden, tokens=TOKENS, expr=SWIGLU
    )
    rows = {"x": address(x), "x_stride": layer.hidden, "tokens": tokens}
    experts = {"ids": address(ids), "table": address(layer.table), "tokens": tokens}

    def all_of(run: Callable[..., None]) -> list[np.ndarray]:
        y, z = (filled((tokens, layer.inner), kind) for kind in (np.float32, np.uint16))
        act = filled((tokens * TOP_K, layer.inner), np.uint16)
        total = filled((tokens, layer.hidden), np.float32)
        run(
            jit, linear, **rows, w=address(gate.data), scale=address(gate.scale), bias=0,
            y=address(y), y_stride=layer.inner, rows=layer.inner,
        )  # fmt: skip
        run(
            jit, gated, **rows, gate=address(gate.data), gate_scale=address(gate.scale),
            up=address(up.data), up_scale=address(up.scale), y=address(z),
            y_stride=layer.inner, rows=layer.inner, gate_bias=0, up_bias=0,
        )  # fmt: skip
        run(
            jit, layer.first, **experts, x=address(x), x_stride=layer.hidden, act=address(act),
            scratch=0, routing=address(routing), gate_bias=0, up_bias=0, teams=0,
        )  # fmt: skip
        run(
            jit, layer.second, **experts, act=address(act), routing=address(routing),
            y=address(total), y_stride=layer.hidden, scratch=address(scratch), bias=0,
        )  # fmt: skip
        return [y, z, act, total]

    def whole(jit: Jit, spec: KernelSpec, **values: int | float) -> None:
        in_turn(jit, spec, 1, **values)

    for one, other in zip(all_of(whole), all_of(in_pieces), strict=True):
        np.testing.assert_array_equal(one, other)
