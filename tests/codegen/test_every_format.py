"""Every format in every matmul and tier, against the same kernel on the same weights as F32, which
other tests hold against float64. Decoders that are made from planes give the very same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from dealt import dealt
from emulated import new_jit
from format_ops import F32, OPS, Call, columns, matrices, near, plain
from format_rows import ROWS, Made, made
from kernel_calls import filled, guarded
from prefill_data import need

from hmc.codegen.arguments import pack
from hmc.codegen.checks import check_spec
from hmc.codegen.formats.dot import Dot
from hmc.codegen.formats.weights import weights_f32
from hmc.codegen.ir import Emitter, const
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.native import is_native, reads_blocks
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError
from hmc.formats import FORMATS, Format, Plane, registered
from hmc.formats.blocks import BLOCKS

EVERY = [row for row in (*FORMATS.values(), *ROWS) if not row.codes.block[1] or row.name in BLOCKS]
"""Formats, and rows that only tests have."""
_NAMES = [row.name for row in EVERY]
_BETWEEN = list(TIERS)[1:-1]


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """The formats of tests are formats."""
    with registered(*ROWS):
        yield


def row_of(name: str) -> Format:
    return next(row for row in EVERY if row.name == name)


_OFTEN = [(isa, op) for op in OPS for isa in TIERS if isa not in _BETWEEN]
_SELDOM = [
    pytest.param(name, isa, op, marks=pytest.mark.slow)
    for name in _NAMES
    for isa in _BETWEEN
    for op in OPS
]


@pytest.mark.few(10)
@pytest.mark.parametrize(("name", "isa", "op"), dealt(_NAMES, _OFTEN) + _SELDOM)
def test_as_f32(jit: Jit, name: str, isa: str, op: str) -> None:
    need(isa)
    row = row_of(name)
    weights = matrices(op, row)
    found = Call(jit, op, isa, row, weights).run()
    expected = Call(jit, op, isa, F32, plain(weights)).run()
    spec = KernelSpec.of(op, isa, weight=name, **weights[0].params)
    summed_alike = all(plane.kind != "order" for plane in row.planes)
    if summed_alike and not is_native(spec) and not reads_blocks(spec):
        assert np.array_equal(found, expected)
        return
    assert near(found, expected)


def decoding(spec: KernelSpec) -> str:
    """y = row `rows` of w, in f32."""
    e = Emitter(spec)
    row = Dot(spec, spec["k"]).row(e, (e.arg["w"], e.arg["scale"]), e.arg["rows"])
    for number, vector in enumerate(weights_f32(e, spec, row, const(0), spec["k"])):
        e.store(vector, e.arg["y"], const(number * vector.type.count))
    return e.finish()


@pytest.fixture(scope="module")
def decoder() -> Jit:
    return new_jit({"linear": decoding})


@pytest.mark.few(20)
@pytest.mark.parametrize(("name", "isa"), dealt(_NAMES, [(isa,) for isa in TIERS]))
def test_made_decoders_give_the_bits_of_the_reference(decoder: Jit, name: str, isa: str) -> None:
    """With every dtype that scales may be in, as they are in memory."""
    need(isa)
    row = row_of(name)
    k, group = columns(row)
    for number in range(max(len(plane.dtypes) for plane in row.planes)):
        dtypes = tuple(plane.dtypes[min(number, len(plane.dtypes) - 1)] for plane in row.planes)
        weight = made(np.random.default_rng(1), row, 5, k, group, dtypes, guarded)
        spec = KernelSpec.of("linear", isa, weight=name, k=k, tokens=1, **weight.params)
        check_spec(spec)
        if is_native(spec):
            continue
        lanes = TIERS[isa].lanes
        for number in (0, 4):
            y = filled((-(-k // lanes) * lanes,), np.float32)
            decoder.get(spec)(
                pack("linear", x=0, x_stride=0, w=weight.codes, scale=weight.beside, bias=0,
                     y=y.ctypes.data, y_stride=0, rows=number, tokens=1)
            )  # fmt: skip
            assert np.array_equal(y[:k], _as_they_lie(row, weight)[number])
            assert (y[k:] == 0).all()


def _as_they_lie(row: Format, weight: Made) -> np.ndarray:
    """The values of a weight, columns in the order in which memory holds them."""
    for plane, array in zip(row.planes, weight.planes, strict=True):
        if plane.kind == "order":
            return weight.values[:, array.reshape(-1)]
    return weight.values


ODD = Format(
    name="six_bits",
    title="FP6",
    planes=(Plane("codes", ("U8",), bits=6),),
    exact_in=("f32",),
    values=tuple(float(code) for code in range(64)),
)


def test_planes_that_no_decoder_can_be_made_for() -> None:
    with registered(ODD), pytest.raises(KernelError, match="made for codes of 2, 4 and 8 bits"):
        check_spec(KernelSpec.of("linear", "avx512", weight="six_bits", k=48, tokens=1))
    with pytest.raises(KernelError, match="reads int4 in groups, not of 0"):
        check_spec(KernelSpec.of("linear", "avx512", weight="int4", k=48, tokens=1))
    spec = KernelSpec.of("linear", "avx2", weight="int4", k=48, tokens=1, group=32, scale_dtype=5)
    with pytest.raises(KernelError, match="scale in BF16 or F32 or F16"):
        check_spec(spec)
