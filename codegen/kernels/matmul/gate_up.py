"""`gate_up`: y = expr(gate = x gate^T, up = x up^T) in bf16, such as silu(gate) * up, products with
biases where there are any; blocks of gate rows and the same up rows by turns, one worker both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from hmc.codegen.decode.tiles import BYTES, FLOATS, GRAIN, ROWS, Tiles, pointers
from hmc.codegen.expr import WEIGHT, Expr, parse
from hmc.codegen.formats.forms import dot_of
from hmc.codegen.functions import emit
from hmc.codegen.ir import F32, Emitter, Value, const


def emit_gate_up(e: Emitter) -> None:
    """IR of `gate_up`; expr; params k, tokens (, biased) (, group, scale_dtype for int4)."""
    b, spec, tokens = e.b, e.spec, e.arg["tokens"]
    tiles = Tiles(e, dot_of(spec, spec["k"]), spec["tokens"])
    gate, up = ((e.arg[name], e.arg[f"{name}_scale"]) for name in ("gate", "up"))
    xs = tuple(
        tiles.prepared(e.arg["x"], tokens, e.arg["x_stride"], spec["tokens"], beside)
        for _, beside in (gate, up)[: 1 + tiles.ordered]
    )
    ys = pointers(e, spec["tokens"])
    with e.for_range(0, tokens) as token:
        place = b.mul(token, b.shl(e.arg["y_stride"], const(1)))
        b.store(e.offset(e.arg["y"], place), b.gep(ys, [token]))
    start, stop = e.split(e.arg["rows"], GRAIN)
    end = e.offset(gate[0], b.mul(stop, const(tiles.dot.row_bytes)))
    biases = (e.arg["gate_bias"], e.arg["up_bias"]) if spec.get("biased") else ()
    buffers = Buffers(tiles, spec["tokens"])
    buffers.gate_up(gate, up, start, stop, xs, ys, tokens, end, biases)


def activated(
    e: Emitter, tree: Expr, products: Iterable[Value], biases: Sequence[Value], share: Value | None
) -> Value:
    """An expression on the products of gate and up, vectors, with their biases if there are any; a
    `share`, one f32, is the weight.
    """
    gate, up = (
        e.b.fadd(product, bias) if bias is not None else product
        for product, bias in zip_longest(products, biases)
    )
    operands = {"gate": gate, "up": up}
    if share is not None:
        operands[WEIGHT] = e.splat(share, gate.type.count)
    return emit(e, tree, operands.__getitem__, gate.type.count)


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
        xs: Sequence[Value],
        ys: Value,
        tokens: Value,
        following: Value,
        biases: Sequence[Value] = (),
        shares: Value | None = None,
    ) -> None:
        """ys[t][row] = expr(gate[row] . x[t], up[row] . x[t]) for rows [start, stop), as bf16.

        `gate` and `up` are (weights, scales); `ys` is i8** of `tokens` rows, and so are `xs`: one
        prepared for both matrices, or one for each; `following` is what the caller reads next.
        `biases` f32 of gate and up are added to the products; `shares` f32* are the tokens'
        weights.
        """
        tiles, e = self._tiles, self._tiles.e
        b, row_bytes, stride = e.b, const(tiles.dot.row_bytes), const(ROWS)
        with e.for_range(start, stop, ROWS) as first:
            last = e.minimum(b.add(first, const(ROWS)), stop)
            same_up = e.offset(up[0], b.mul(first, row_bytes))
            next_gate = e.offset(gate[0], b.mul(last, row_bytes))
            after = b.select(b.icmp_signed("<", last, stop), next_gate, following)
            tiles.matvec(gate, first, last, xs[0], tokens, self._gate, stride, same_up)
            tiles.matvec(up, first, last, xs[-1], tokens, self._up, stride, after)
            with e.for_range(0, tokens) as token:
                line = b.mul(token, stride)
                left, right = (
                    b.bitcast(b.gep(buffer, [line]), BYTES) for buffer in (self._gate, self._up)
                )
                y = b.load(b.gep(ys, [token]))
                share = None if shares is None else b.load(b.gep(shares, [token]))
                for index, width in e.in_vectors(b.sub(last, first), 16):
                    row = b.add(first, index)
                    products = (_load(e, part, index, width) for part in (left, right))
                    added = [_load(e, bias, row, width) for bias in biases]
                    value = activated(e, self._tree, products, added, share)
                    e.store(e.f32_to_bf16(value), y, row)


def _load(e: Emitter, base: Value, index: Value, width: int) -> Value:
    if width == 1:
        return e.splat(e.load(base, index, F32), 1)
    return e.load_vec(base, index, F32, width)
