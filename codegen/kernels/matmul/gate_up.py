"""`gate_up`: y = expr(gate = x gate^T, up = x up^T) in bf16, such as silu(gate) * up; blocks of
gate rows and the same up rows by turns, one worker both.
"""

from __future__ import annotations

from hmc.codegen.decode.tiles import BYTES, FLOATS, GRAIN, ROWS, Tiles
from hmc.codegen.expr import Expr, parse
from hmc.codegen.formats.table import dot_of
from hmc.codegen.functions import emit
from hmc.codegen.ir import F32, Emitter, Value, const
from hmc.codegen.kernels.matmul.linear import addresses
from hmc.codegen.spec import KernelSpec


def emit_gate_up(spec: KernelSpec) -> str:
    """IR of `gate_up`; expr; params k, tokens (, group, scale_bits for int4)."""
    e = Emitter(spec)
    tiles = Tiles(e, dot_of(spec, spec["k"]), spec["tokens"])
    tokens = e.arg["tokens"]
    prepared = tiles.prepare(e, e.arg["x"], tokens, e.arg["x_stride"], spec["tokens"])
    xs = addresses(e, prepared, tokens, tiles.dot.prepared_bytes, spec["tokens"])
    ys = addresses_of_rows(e, e.arg["y"], tokens, e.arg["y_stride"], spec["tokens"])
    start, stop = e.split(e.arg["rows"], GRAIN)
    gate = (e.arg["gate"], e.arg["gate_scale"])
    up = (e.arg["up"], e.arg["up_scale"])
    end = e.offset(gate[0], e.b.mul(stop, const(tiles.dot.row_bytes)))
    buffers = Buffers(e, spec["tokens"])
    buffers.gate_up(e, tiles, gate, up, start, stop, xs, ys, tokens, end)
    return e.finish()


def activated(e: Emitter, tree: Expr, gate: Value, up: Value) -> Value:
    """An expression of gate and up on two vectors of products."""
    return emit(e, tree, {"gate": gate, "up": up}.__getitem__, gate.type.count)


def addresses_of_rows(e: Emitter, base: Value, count: Value, stride: Value, most: int) -> Value:
    """A stack array (i8**) of the addresses of `count` <= `most` bf16 rows, `stride` elements
    apart.
    """
    table = e.b.bitcast(e.local(BYTES, count=most), BYTES.as_pointer())
    with e.for_range(0, count) as index:
        place = e.b.mul(index, e.b.shl(stride, const(1)))
        e.b.store(e.offset(base, place), e.b.gep(table, [index]))
    return table


class Buffers:
    """Stack room for the gate and up results of one block of rows."""

    def __init__(self, e: Emitter, tokens: int) -> None:
        self._tree = parse(e.spec.expr)
        self._gate, self._up = (
            e.b.bitcast(e.local(F32, count=tokens * ROWS), FLOATS) for _ in range(2)
        )

    def gate_up(
        self,
        e: Emitter,
        tiles: Tiles,
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
        b, row_bytes = e.b, const(tiles.dot.row_bytes)
        with e.for_range(start, stop, ROWS) as first:
            last = e.minimum(b.add(first, const(ROWS)), stop)
            same_up = e.offset(up[0], b.mul(first, row_bytes))
            next_gate = e.offset(gate[0], b.mul(last, row_bytes))
            after = b.select(b.icmp_signed("<", last, stop), next_gate, following)
            stride = const(ROWS)
            tiles.matvec(e, *gate, first, last, xs, tokens, self._gate, stride, same_up)
            tiles.matvec(e, *up, first, last, xs, tokens, self._up, stride, after)
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
