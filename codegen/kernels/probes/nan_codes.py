"""Which spans of FP8 codes hold a NaN: read once when weights are opened, so that the kernels of
tiers that decode codes by shifts (unpack.py) need not look at every code of every step.
"""

from __future__ import annotations

from llvmlite import ir

from hmc.codegen.ir import I8, I64, Emitter, Value, const, vec
from hmc.codegen.vector import splat_int

_RUNS = 4
"""Parts of a span read side by side, each front to back, as memory likes it."""


def emit_nan_codes(e: Emitter) -> None:
    """IR of `nan_codes`: found[i] = 1 if one of the E4M3 codes of span i is 0x7F or 0xFF, else 0.

    Split by spans, which should therefore be of like size.
    """
    b = e.b
    width = e.tier.vector_bits // 8
    kind = vec(I8, width)
    magnitude = splat_int(I8, width, 0x7F)

    def larger(codes: Value, most: Value, mask: Value) -> Value:
        found = b.and_(codes, mask)
        return b.select(b.icmp_unsigned(">", found, most), found, most)

    start, stop = e.split(e.arg["count"])
    with e.for_range(start, stop) as index:
        pair = b.mul(index, const(2))
        base = b.inttoptr(e.load(e.arg["spans"], pair, I64, align=8), I8.as_pointer())
        size = e.load(e.arg["spans"], b.add(pair, const(1)), I64, align=8)
        most = [e.local(kind, e.zeros(I8, width)) for _ in range(_RUNS)]
        run = b.and_(b.udiv(size, const(_RUNS)), const(-width))
        whole = b.mul(run, const(_RUNS))
        with e.for_range(0, run, width) as at:
            for number, slot in enumerate(most):
                codes = e.load_vec(base, b.add(at, b.mul(run, const(number))), I8, width)
                b.store(larger(codes, b.load(slot), magnitude), slot)
        rest = e.local(I8, I8(0))
        with e.for_range(whole, size) as at:
            b.store(larger(e.load(base, at, I8), b.load(rest), I8(0x7F)), rest)
        nan = b.icmp_unsigned("==", b.load(rest), I8(0x7F))
        mask = ir.IntType(width)
        for slot in most:
            lanes = b.bitcast(b.icmp_unsigned("==", b.load(slot), magnitude), mask)
            nan = b.or_(nan, b.icmp_unsigned("!=", lanes, mask(0)))
        e.store(b.zext(nan, I64), e.arg["found"], index, align=8)
