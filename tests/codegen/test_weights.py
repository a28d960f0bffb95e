"""`weights_f32`: exact decode of every format in every tier, nothing read past the last weight."""

from __future__ import annotations

import numpy as np
import pytest
from decode_data import weights
from emulated import new_jit
from kernel_calls import address, filled, guarded
from prefill_data import e4m3, need

from hmc.codegen.arguments import pack
from hmc.codegen.formats.pairs import pair_codes
from hmc.codegen.formats.planes import Row
from hmc.codegen.formats.weights import row_bytes, weights_f32
from hmc.codegen.ir import Emitter, const
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec, WeightFormat
from hmc.formats import format_of

_GROUPS = {"group": 128, "scale_dtype": 0}
"""Of int4, for whose scales nobody asks here."""


def emit_decode(spec: KernelSpec) -> str:
    """y = the first k weights of w, in f32."""
    e = Emitter(spec)
    row = Row(e.arg["w"], ())
    for number, vector in enumerate(weights_f32(e, spec, row, const(0), spec["k"])):
        e.store(vector, e.arg["y"], const(number * vector.type.count))
    return e.finish()


@pytest.fixture(scope="module")
def decoder() -> Jit:
    return new_jit({"linear": emit_decode})


def decode(
    decoder: Jit, isa: str, weight: WeightFormat, count: int, data: np.ndarray
) -> np.ndarray:
    """`count` weights of `data` and what lies behind them in whole vectors."""
    spec = KernelSpec.of("linear", isa, weight=weight, k=count, tokens=1, **_GROUPS)
    y = filled((-(-count // TIERS[isa].lanes) * TIERS[isa].lanes,), np.float32)
    block = pack(
        "linear", x=0, x_stride=0, w=address(data), scale=0, bias=0, y=address(y), y_stride=0,
        rows=1, tokens=1,
    )  # fmt: skip
    decoder.get(spec)(block)
    return y


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("count", [256, 253])
def test_fp8_codes(decoder: Jit, isa: str, count: int) -> None:
    need(isa)
    codes = guarded(np.arange(256, dtype=np.uint8)[:count])
    y = decode(decoder, isa, "fp8", count, codes)
    np.testing.assert_array_equal(y[:count], e4m3(codes).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(y[:count][:120]), False)
    assert np.signbit(y[128])
    assert (y[count:] == 0).all()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("weight", ["bf16", "fp16", "f32"])
def test_floats(decoder: Jit, isa: str, weight: WeightFormat) -> None:
    need(isa)
    matrix = weights(np.random.default_rng(1), weight, 1, 37)
    y = decode(decoder, isa, weight, 37, matrix.data)
    np.testing.assert_array_equal(y[:37], matrix.values[0].astype(np.float32))
    assert (y[37:] == 0).all()


@pytest.mark.parametrize("isa", TIERS)
def test_int4(decoder: Jit, isa: str) -> None:
    need(isa)
    words = guarded(np.array([0x76543210, 0xFEDCBA98, 0x00000F80], np.uint32))
    y = decode(decoder, isa, "int4", 24, words)
    expected = [*range(-8, 8), -8, 0, 7, -8, -8, -8, -8, -8]
    assert y[:24].tolist() == expected


def test_tables_are_the_codes() -> None:
    bits = np.array(pair_codes(format_of("fp8")).table[:128], np.uint32)
    values = (bits << 16).view(np.float32)
    np.testing.assert_array_equal(values, e4m3(np.arange(128)).astype(np.float32))


def test_row_bytes() -> None:
    assert [row_bytes(weight, 33) for weight in ("fp8", "bf16", "fp16", "f32", "int4")] == [
        33, 66, 66, 132, 20,
    ]  # fmt: skip
