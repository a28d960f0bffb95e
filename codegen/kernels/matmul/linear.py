"""`linear`: y = x w^T (+ bias) for 1 to 16 tokens; each worker takes a contiguous slice of the
output rows.
"""

from __future__ import annotations

from hmc.codegen.decode.tiles import BYTES, GRAIN, ROWS, Tiles
from hmc.codegen.formats.table import dot_of
from hmc.codegen.ir import F32, I64, Emitter, Value, const
from hmc.codegen.spec import KernelSpec


def emit_linear(spec: KernelSpec) -> str:
    """IR of `linear`; params k, tokens (, group, scale_bits for int4); `out` f32 or bf16."""
    e = Emitter(spec)
    b = e.b
    dot = dot_of(spec, spec["k"])
    tiles = Tiles(e, dot, spec["tokens"])
    w, tokens = e.arg["w"], e.arg["tokens"]
    prepared = tiles.prepare(e, e.arg["x"], tokens, e.arg["x_stride"], spec["tokens"])
    xs = addresses(e, prepared, tokens, dot.prepared_bytes, spec["tokens"])
    out = e.local(F32, count=spec["tokens"] * ROWS)
    start, stop = e.split(e.arg["rows"], GRAIN)
    with e.for_range(start, stop, ROWS) as first:
        last = e.minimum(b.add(first, const(ROWS)), stop)
        following = e.offset(w, b.mul(last, const(dot.row_bytes)))
        tiles.matvec(e, w, e.arg["scale"], first, last, xs, tokens, out, const(ROWS), following)
        with e.for_range(0, tokens) as token:
            line = e.offset(b.bitcast(out, BYTES), b.mul(token, const(4 * ROWS)))
            y = b.add(b.mul(token, e.arg["y_stride"]), first)
            _store(e, line, y, first, b.sub(last, first))
    return e.finish()


def addresses(e: Emitter, base: Value, count: Value, stride: int, most: int) -> Value:
    """A stack array (i8**) of `count` <= `most` addresses, `stride` bytes apart from `base` on."""
    table = e.b.bitcast(e.local(BYTES, count=most), BYTES.as_pointer())
    with e.for_range(0, count) as index:
        e.b.store(e.offset(base, e.b.mul(index, const(stride))), e.b.gep(table, [index]))
    return table


def _store(e: Emitter, line: Value, y: Value, first: Value, count: Value) -> None:
    """y[...] = line + bias, in vectors and a scalar rest."""
    b = e.b
    no_bias = b.icmp_signed("==", b.ptrtoint(e.arg["bias"], I64), const(0))
    for index, width in e.in_vectors(count, 16):
        value = e.load_vec(line, index, F32, width) if width > 1 else e.load(line, index, F32)
        slot = e.local(value.type, value)
        with b.if_then(b.not_(no_bias)):
            place = b.add(first, index)
            bias = e.arg["bias"]
            more = e.load_vec(bias, place, F32, width) if width > 1 else e.load(bias, place, F32)
            b.store(b.fadd(value, more), slot)
        value = b.load(slot)
        if e.spec.out == "bf16":
            value = e.f32_to_bf16(value)
        e.store(value, e.arg["y"], b.add(y, index))
