"""`gate_up`: y = expr(gate = x gate^T, up = x up^T) in bf16, such as silu(gate) * up; blocks of
gate rows and the same up rows by turns, one worker both.
"""

from __future__ import annotations

from hmc.codegen.decode.tiles import BYTES, FLOATS, GRAIN, ROWS, Tiles, pointers
from hmc.codegen.expr import Expr, parse
from hmc.codegen.formats.whole import dot_of
from hmc.codegen.functions import emit
from hmc.codegen.ir import F32, Emitter, Value, const


def emit_gate_up(e: Emitter) -> None:
    """IR of `gate_up`; expr; params k, tokens (, group, scale_dtype for int4)."""
    b, spec, tokens = e.b, e.spec, e.arg["tokens"]
    tiles = Tiles(e, dot_of(spec, spec["k"]), spec["tokens"])
    xs = tiles.prepared(e.arg["x"], tokens, e.arg["x_stride"], spec["tokens"])
    ys = pointers(e, spec["tokens"])
    with e.for_range(0, tokens) as token:
        place = b.mul(token, b.shl(e.arg["y_stride"], const(1)))
        b.store(e.offset(e.arg["y"], place), b.gep(ys, [token]))
    start, stop = e.split(e.arg["rows"], GRAIN)
    gate, up = ((e.arg[name], e.arg[f"{name}_scale"]) for name in ("gate", "up"))
    end = e.offset(gate[0], b.mul(stop, const(tiles.dot.row_bytes)))
    Buffers(tiles, spec["tokens"]).gate_up(gate, up, start, stop, xs, ys, tokens, end)


def activated(e: Emitter, tree: Expr, gate: Value, up: Value) -> Value:
    """An expression of gate and up on two vectors of products."""
    return emit(e, tree, {"gate": gate, "up": up}.__getitem__, gate.type.count)


class Buffers:
    """Stack room for the gate and up results of one block of rows."""

    def __init__(self, tiles: Tiles, tokens: int) -> None:
        e = tiles.e
        self._tiles, self._tree = tiles, parse(e.spec.expr)
        self._gate, self._up = (
            e.b.bitcast(e.local(F32, count=tokens * ROWS), FLOATS) for _ in range(2)
        )

    def gate_up(
        self,
        gate: tuple[Value, Value],
        up: tuple[Value, Value],
        start: Value,
        stop: Value,
        xs: Value,
        ys: Value,
        tokens: Value,
        following: Value,
    ) -> None:
        """ys[t][row] = expr(gate[row] . xs[t], up[row] . xs[t]) for rows [start, stop), as bf16.

        `gate` and `up` are (weights, scales); `xs` and `ys` are i8** of `tokens` rows; `following`
        is what the caller reads next.
        """
        tiles, e = self._tiles, self._tiles.e
        b, row_bytes, stride = e.b, const(tiles.dot.row_bytes), const(ROWS)
        with e.for_range(start, stop, ROWS) as first:
            last = e.minimum(b.add(first, const(ROWS)), stop)
            same_up = e.offset(up[0], b.mul(first, row_bytes))
            next_gate = e.offset(gate[0], b.mul(last, row_bytes))
            after = b.select(b.icmp_signed("<", last, stop), next_gate, following)
            tiles.matvec(gate, first, last, xs, tokens, self._gate, stride, same_up)
            tiles.matvec(up, first, last, xs, tokens, self._up, stride, after)
            with e.for_range(0, tokens) as token:
                line = b.mul(token, stride)
                left, right = (
                    b.bitcast(b.gep(buffer, [line]), BYTES) for buffer in (self._gate, self._up)
                )
                y = b.load(b.gep(ys, [token]))
                for index, width in e.in_vectors(b.sub(last, first), 16):
                    products = (_load(e, part, index, width) for part in (left, right))
                    value = activated(e, self._tree, *products)
                    e.store(e.f32_to_bf16(value), y, b.add(first, index))


def _load(e: Emitter, base: Value, index: Value, width: int) -> Value:
    if width == 1:
        return e.splat(e.load(base, index, F32), 1)
    return e.load_vec(base, index, F32, width)
