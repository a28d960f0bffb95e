"""Blocks of GGUF, one token to many, against float64; kernels are those of test_every_format."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from decode_data import as_multiplied, bound
from format_ops import Call, matrices
from prefill_data import activations, as_packed, from_bf16, need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec
from hmc.formats import FORMATS
from hmc.formats.gguf import GGUF

OPS = {"linear": as_multiplied, "gemm": as_packed}
QUICK = {("q4_k", "avx512_bf16", "gemm"), ("q2_k", "avx2", "gemm"), ("q5_1", "avx2", "linear")}
"""Minima of groups of both sizes, fifth bits, both arithmetics; the rest in `make test-all`."""
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
