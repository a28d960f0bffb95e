"""`gate_up`: y = expr(gate = x gate^T, up = x up^T) in bf16, such as silu(gate) * up, products with
biases where there are any; blocks of gate rows and the same up rows by turns, one worker both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from hmc.codegen.decode.tiles import BYTES, FLOATS, GRAIN, ROWS, Tiles, pointers
from hmc.codegen.expr import GATED, WEIGHT, Expr, parse
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
    buffers.activate((gate, up), start, stop, xs, ys, tokens, end, biases)


def activated(
    e: Emitter, tree: Expr, products: Iterable[Value], biases: Sequence[Value], share: Value | None
) -> Value:
    """An expression on the products of gate and up, or of up alone, vectors, with their biases if
    there are any; a `share`, one f32, is the weight.
    """
    found = [
        e.b.fadd(product, bias) if bias is not None else product
        for product, bias in zip_longest(products, biases)
    ]
    operands, lanes = dict(zip(GATED[-len(found) :], found, strict=True)), found[0].type.count
    if share is not None:
        operands[WEIGHT] = e.splat(share, lanes)
    return emit(e, tree, operands.__getitem__, lanes)


class Buffers:
    """Stack room for the results of one block of rows, of gate and up, or of `count` = 1 matrix:
    up alone.
    """

    def __init__(self, tiles: Tiles, tokens: int, count: int = 2) -> None:
        e = tiles.e
        self._tiles, self._tree = tiles, parse(e.spec.expr)
        self._products = [
            e.b.bitcast(e.local(F32, count=tokens * ROWS), FLOATS) for _ in range(count)
        ]

    def activate(
        self,
        matrices: Sequence[tuple[Value, Value]],
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

        `matrices` are (weights, scales) of each; `ys` is i8** of `tokens` rows, and so are `xs`:
        one prepared for all matrices, or one for each; `following` is what the caller reads next.
        `biases` f32 of the matrices are added to the products; `shares` f32* are the tokens'
        weights.
        """
        tiles, e = self._tiles, self._tiles.e
        b, row_bytes, stride = e.b, const(tiles.dot.row_bytes), const(ROWS)
        with e.for_range(start, stop, ROWS) as first:
            last = e.minimum(b.add(first, const(ROWS)), stop)
            below = e.offset(matrices[0][0], b.mul(last, row_bytes))
            after = [e.offset(codes, b.mul(first, row_bytes)) for codes, _ in matrices[1:]]
            after.append(b.select(b.icmp_signed("<", last, stop), below, following))
            for at, (matrix, out) in enumerate(zip(matrices, self._products, strict=True)):
                x = xs[min(at, len(xs) - 1)]
                tiles.matvec(matrix, first, last, x, tokens, out, stride, after[at])
            with e.for_range(0, tokens) as token:
                line = b.mul(token, stride)
                parts = [b.bitcast(b.gep(buffer, [line]), BYTES) for buffer in self._products]
                y = b.load(b.gep(ys, [token]))
                share = None if shares is None else b.load(b.gep(shares, [token]))
                for index, width in e.in_vectors(b.sub(last, first), 16):
                    row = b.add(first, index)
                    products = (_load(e, part, index, width) for part in parts)
                    added = [_load(e, bias, row, width) for bias in biases]
                    value = activated(e, self._tree, products, added, share)
                    e.store(e.f32_to_bf16(value), y, row)


def _load(e: Emitter, base: Value, index: Value, width: int) -> Value:
    if width == 1:
        return e.splat(e.load(base, index, F32), 1)
    return e.load_vec(base, index, F32, width)
