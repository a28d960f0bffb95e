"""What heads are made of their token's position, in place: rotary embedding behind an optional
per-head RMS norm, and a scale by head.

A pair (a, b) at angle index i of position p becomes (a cos - b sin, b cos + a sin). Both pairings
leave the values where their pair was: dot products of queries and keys do not depend on where a
pair is kept.
"""

from __future__ import annotations

from hmc.codegen import functions
from hmc.codegen.ir import F32, I64, Emitter, Value, const, lanes_mask
from hmc.codegen.kernels.pointwise.norm import norm_row
from hmc.codegen.vector import for_blocks, for_strips, load_f32, store_f32


def emit_rotary(e: Emitter) -> None:
    """`rotary`: split by (token, head); `spec.weight` empty means that there is no norm."""
    b, spec = e.b, e.spec
    heads, head_dim, dim = spec["heads"], spec["head_dim"], spec["dim"]
    start, stop = e.split(b.mul(e.arg["tokens"], const(heads)))
    with e.for_range(start, stop) as item:
        token, head = b.sdiv(item, const(heads)), b.srem(item, const(heads))
        x = e.row("x", token, head, head_dim)
        if spec.weight:
            present = b.icmp_unsigned("!=", b.ptrtoint(e.arg["gamma"], I64), const(0))
            with b.if_then(present):
                norm_row(e, head_dim, x, x, "f32")
        angles = b.mul(e.load_int(e.arg["positions"], token), const(dim // 2))
        cos, sin = (e.at(e.arg[name], angles, F32) for name in ("cos", "sin"))
        part = e.at(x, const(spec["start"]), F32)
        (rotate_pairs if spec["interleaved"] else _rotate_halves)(e, part, cos, sin, dim)


def emit_position_scale(e: Emitter) -> None:
    """`position_scale`: split by (token, head)."""
    b, heads, head_dim = e.b, e.spec["heads"], e.spec["head_dim"]
    start, stop = e.split(b.mul(e.arg["tokens"], const(heads)))
    with e.for_range(start, stop) as item:
        token, head = b.sdiv(item, const(heads)), b.srem(item, const(heads))
        x = e.row("x", token, head, head_dim)
        place = b.add(e.load_int(e.arg["positions"], token), const(1))
        logarithm = functions.log(e, e.splat(b.sitofp(place, F32), e.lanes))
        scale, bias = (
            e.splat(e.load(e.arg[name], head, F32), e.lanes) for name in ("scale", "bias")
        )
        factor = e.fma(scale, logarithm, bias)

        def strip(index: Value, count: int, way: int) -> None:
            value = load_f32(e, "f32", x, index, count)
            store_f32(e, "f32", b.fmul(value, factor), x, index, count)

        for_strips(e, head_dim, e.lanes, strip)


def _turn(e: Emitter, first: Value, second: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
    b = e.b
    return (
        e.fma(first, cos, b.fneg(b.fmul(second, sin))),
        e.fma(second, cos, b.fmul(first, sin)),
    )


def _rotate_halves(e: Emitter, part: Value, cos: Value, sin: Value, dim: int) -> None:
    half = dim // 2
    upper = e.at(part, const(half), F32)

    def block(index: Value, count: int) -> None:
        loaded = [load_f32(e, "f32", place, index, count) for place in (part, upper, cos, sin)]
        first, second = _turn(e, *loaded)
        store_f32(e, "f32", first, part, index, count)
        store_f32(e, "f32", second, upper, index, count)

    for_blocks(e, half, e.lanes, block)


def rotate_pairs(e: Emitter, part: Value, cos: Value, sin: Value, dim: int) -> None:
    """Turn `dim` f32 at `part`, each two neighbours, by the angles of one position."""
    lanes = e.lanes
    even, odd = (lanes_mask(list(range(start, 2 * lanes, 2))) for start in (0, 1))
    zipped = lanes_mask([lane // 2 + lane % 2 * lanes for lane in range(2 * lanes)])

    def block(index: Value, count: int) -> None:
        at = e.b.mul(index, const(2))
        both = load_f32(e, "f32", part, at, 2 * count, 2 * lanes)
        first, second = (e.b.shuffle_vector(both, both, mask) for mask in (even, odd))
        angle = [load_f32(e, "f32", place, index, count) for place in (cos, sin)]
        first, second = _turn(e, first, second, *angle)
        store_f32(e, "f32", e.b.shuffle_vector(first, second, zipped), part, at, 2 * count)

    for_blocks(e, dim // 2, lanes, block)
