"""Blocks of GGUF, one token to many, against float64; kernels are those of test_every_format."""

from __future__ import annotations

import numpy as np
import pytest
from dealt import dealt
from decode_data import as_multiplied, bound
from format_ops import Call, matrices
from prefill_data import activations, as_packed, from_bf16, need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec
from hmc.formats.gguf import GGUF

OPS = {"linear": as_multiplied, "gemm": as_packed}


@pytest.mark.parametrize(
    ("row", "isa", "op"), dealt(GGUF, [(isa, op) for op in OPS for isa in TIERS])
)
def test_sums_are_exact_but_for_rounding(jit: Jit, row, isa: str, op: str) -> None:
    need(isa)
    weights = matrices(op, row)
    y, values = Call(jit, op, isa, row, weights).run(), weights[0].values.astype(np.float64)
    k = values.shape[1]
    spec = KernelSpec.of(op, isa, weight=row.name, k=k)
    seen = OPS[op](spec, from_bf16(activations(np.random.default_rng(2), len(y), k, k)))
    assert (np.abs(y - seen @ values.T) <= bound(seen, values)).all()
