"""Blocks of GGUF, one token to many, against float64; kernels are those of test_every_format."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from decode_data import as_multiplied, bound
from format_ops import Call, matrices
from kernel_calls import address, filled, guarded, in_turn
from prefill_data import activations, as_packed, from_bf16, need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec
from hmc.formats import FORMATS
from hmc.formats.gguf import GGUF

OPS = {"linear": as_multiplied, "gemm": as_packed}
QUICK = {
    ("q4_k", "avx512_bf16", "gemm"), ("q2_k", "avx2", "gemm"), ("q5_1", "avx2", "linear"),
    ("q4_k", "avx512_bf16", "linear"), ("q6_k", "avx512_bf16", "linear"),
}  # fmt: skip
"""Minima of groups of both sizes, fifth bits, all arithmetics; the rest in `make test-all`."""
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in product([row.name for row in GGUF], TIERS, OPS)
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "isa", "op"), CASES)
def test_sums_are_exact_but_for_rounding(jit: Jit, name: str, isa: str, op: str) -> None:
    need(isa)
    row = FORMATS[name]
    weights = matrices(op, row)
    y, values = Call(jit, op, isa, row, weights).run(), weights[0].values.astype(np.float64)
    k = values.shape[1]
    spec = KernelSpec.of(op, isa, weight=name, k=k)
    seen = OPS[op](spec, from_bf16(activations(np.random.default_rng(2), len(y), k, k)))
    assert (np.abs(y - seen @ values.T) <= bound(seen, values)).all()


@pytest.mark.parametrize("name", ["q4_k", "iq4_nl"])
def test_activations_of_any_size(jit: Jit, name: str) -> None:
    """As two bytes: chunks of tiny, huge and no activations, and of the largest alone; infinities
    and NaN spoil their own token alone. A token's sums are the same in any batch.
    """
    need("avx512_bf16")
    (weights,) = matrices("linear", FORMATS[name])
    (rows, k), values = weights.values.shape, weights.values.astype(np.float64)
    spec = KernelSpec.of("linear", "avx512_bf16", weight=name, k=k, tokens=7)
    rng = np.random.default_rng(8)
    x = activations(rng, 7, k, k)
    sizes = (0x0000, 0x0001, 0x0080, 0x7149, 0x3F80)
    for token, bits in enumerate(sizes):  # 0, a subnormal, the smallest normal, 1e30, 1; signed
        x[token] = np.where(rng.integers(0, 2, k), bits, bits | 0x8000)
    x[5, 150], x[6, 7] = 0x7F80, 0x7FC0

    def run(some: np.ndarray) -> np.ndarray:
        y = filled((len(some), rows), np.float32)
        in_turn(
            jit, spec, 2, x=address(some), x_stride=k, w=weights.codes, scale=weights.beside,
            bias=0, y=address(y), y_stride=rows, rows=rows, tokens=len(some),
        )  # fmt: skip
        return y

    y = run(guarded(x))
    seen = as_multiplied(spec, from_bf16(x[:5]))
    assert (np.abs(y[:5] - seen @ values.T) <= bound(seen, values)).all()
    assert not np.isfinite(y[5:]).any()
    for token in range(5):
        np.testing.assert_array_equal(run(guarded(x[token : token + 1]))[0], y[token])


@pytest.mark.parametrize(("name", "most"), [("q4_k", "vpdpbusd"), ("q8_0", "vpdpwssd")])
def test_instructions_of_few_tokens(jit: Jit, name: str, most: str) -> None:
    """Codes of less than a byte are multiplied as bytes, others as words."""
    text = jit.assembly(KernelSpec.of("linear", "avx512_bf16", weight=name, k=256, tokens=1))
    assert most in text and "vdpbf16ps" not in text
