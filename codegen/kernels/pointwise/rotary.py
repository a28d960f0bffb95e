"""Rotary position embedding in place, behind an optional per-head RMS norm.

A pair (a, b) at angle index i of position p becomes (a cos - b sin, b cos + a sin). Both pairings
leave the values where their pair was: dot products of queries and keys do not depend on where a
pair is kept.
"""

from __future__ import annotations

from hmc.codegen import vector
from hmc.codegen.ir import F32, I32, I64, Emitter, Value, const
from hmc.codegen.isa import TIERS
from hmc.codegen.kernels.pointwise.norm import SquareSum
from hmc.codegen.spec import KernelSpec


def emit_rotary(spec: KernelSpec) -> str:
    """`rotary`: split by (token, head); `spec.weight` empty means that there is no norm."""
    e = Emitter(spec)
    b, heads, head_dim = e.b, spec["heads"], spec["head_dim"]
    start_column, dim = spec["start"], spec["dim"]
    start, stop = e.split(b.mul(e.arg["tokens"], const(heads)))
    with e.for_range(start, stop) as item:
        token, head = b.sdiv(item, const(heads)), b.srem(item, const(heads))
        column = b.mul(head, const(head_dim))
        x = e.at(e.arg["x"], b.add(b.mul(token, e.arg["x_stride"]), column), F32)
        if spec.weight:
            present = b.icmp_unsigned("!=", b.ptrtoint(e.arg["gamma"], I64), const(0))
            with b.if_then(present):
                _normalise(e, x)
        position = b.sext(e.load(e.arg["positions"], token, I32), I64)
        angles = b.mul(position, const(dim // 2))
        cos, sin = (e.at(e.arg[name], angles, F32) for name in ("cos", "sin"))
        part = e.at(x, const(start_column), F32)
        (_rotate_pairs if spec["interleaved"] else _rotate_halves)(e, part, cos, sin)
    return e.finish()


def _normalise(e: Emitter, x: Value) -> None:
    lanes, width = TIERS[e.spec.isa].lanes, e.spec["head_dim"]
    squares = SquareSum(e, lanes)

    def collect(index: Value, count: int, way: int) -> None:
        squares.add(vector.load_f32(e, "f32", x, index, count, lanes), way)

    vector.for_strips(e, width, lanes, collect, 4)
    scale = e.splat(squares.inverse_root(width, e.arg["eps"]), lanes)

    def apply(index: Value, count: int, way: int) -> None:
        value = e.b.fmul(vector.load_f32(e, "f32", x, index, count, lanes), scale)
        gamma = vector.load_f32(e, e.spec.weight, e.arg["gamma"], index, count, lanes)
        vector.store_f32(e, "f32", e.b.fmul(value, gamma), x, index, count)

    vector.for_strips(e, width, lanes, apply, 4)


def _turn(e: Emitter, first: Value, second: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
    b = e.b
    return (
        e.fma(first, cos, b.fneg(b.fmul(second, sin))),
        e.fma(second, cos, b.fmul(first, sin)),
    )


def _rotate_halves(e: Emitter, part: Value, cos: Value, sin: Value) -> None:
    lanes, half = TIERS[e.spec.isa].lanes, e.spec["dim"] // 2
    upper = e.at(part, const(half), F32)

    def strip(index: Value, count: int, way: int) -> None:
        loaded = [
            vector.load_f32(e, "f32", p, index, count, lanes) for p in (part, upper, cos, sin)
        ]
        first, second = _turn(e, *loaded)
        vector.store_f32(e, "f32", first, part, index, count)
        vector.store_f32(e, "f32", second, upper, index, count)

    vector.for_strips(e, half, lanes, strip)


def _rotate_pairs(e: Emitter, part: Value, cos: Value, sin: Value) -> None:
    lanes, half = TIERS[e.spec.isa].lanes, e.spec["dim"] // 2
    even, odd = (vector.lanes_mask(list(range(start, 2 * lanes, 2))) for start in (0, 1))
    zipped = vector.lanes_mask([lane // 2 + lane % 2 * lanes for lane in range(2 * lanes)])

    def strip(index: Value, count: int, way: int) -> None:
        at = e.b.mul(index, const(2))
        both = vector.load_f32(e, "f32", part, at, 2 * count, 2 * lanes)
        first, second = (e.b.shuffle_vector(both, both, mask) for mask in (even, odd))
        angle = [vector.load_f32(e, "f32", p, index, count, lanes) for p in (cos, sin)]
        first, second = _turn(e, first, second, *angle)
        vector.store_f32(e, "f32", e.b.shuffle_vector(first, second, zipped), part, at, 2 * count)

    vector.for_strips(e, half, lanes, strip)
