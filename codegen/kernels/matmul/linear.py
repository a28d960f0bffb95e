"""`linear`: y = x w^T (+ bias) for 1 to 16 tokens; each worker takes a contiguous slice of the
output rows.
"""

from __future__ import annotations

from hmc.codegen.decode.tiles import BYTES, GRAIN, ROWS, Tiles
from hmc.codegen.formats.forms import dot_of
from hmc.codegen.ir import F32, I64, Emitter, Value, const


def emit_linear(e: Emitter) -> None:
    """IR of `linear`; params k, tokens (, group, scale_dtype for int4); `out` f32 or bf16."""
    b, spec = e.b, e.spec
    tiles = Tiles(e, dot_of(spec, spec["k"]), spec["tokens"])
    w, scale, tokens = e.arg["w"], e.arg["scale"], e.arg["tokens"]
    xs = tiles.prepared(e.arg["x"], tokens, e.arg["x_stride"], spec["tokens"], scale)
    out = e.local(F32, count=spec["tokens"] * ROWS)
    start, stop = e.split(e.arg["rows"], GRAIN)
    with e.for_range(start, stop, ROWS) as first:
        last = e.minimum(b.add(first, const(ROWS)), stop)
        following = e.offset(w, b.mul(last, const(tiles.dot.row_bytes)))
        tiles.matvec((w, scale), first, last, xs, tokens, out, const(ROWS), following)
        with e.for_range(0, tokens) as token:
            line = e.offset(b.bitcast(out, BYTES), b.mul(token, const(4 * ROWS)))
            y = b.add(b.mul(token, e.arg["y_stride"]), first)
            _store(e, line, y, first, b.sub(last, first))


def _store(e: Emitter, line: Value, y: Value, first: Value, count: Value) -> None:
    """y[...] = line + bias, in vectors and a scalar rest."""
    b, bias = e.b, e.arg["bias"]
    no_bias = b.icmp_signed("==", b.ptrtoint(bias, I64), const(0))
    for index, width in e.in_vectors(count, 16):
        value = e.load_some(line, index, F32, width)
        slot = e.local(value.type, value)
        with b.if_then(b.not_(no_bias)):
            more = e.load_some(bias, b.add(first, index), F32, width)
            b.store(b.fadd(value, more), slot)
        value = b.load(slot)
        if e.spec.out == "bf16":
            value = e.f32_to_bf16(value)
        e.store(value, e.arg["y"], b.add(y, index))
