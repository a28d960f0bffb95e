"""Many-token matmul core: panels of weights decoded once, then register tiles of rows x tokens.

A panel is two vectors of weight rows by one chunk of K. Each chunk is decoded straight from
checkpoint rows into a scratch panel in L1 in which one vector holds the same K position of `lanes`
rows, so sums run along K inside lanes and nothing is ever added across them. Tokens are packed once
(packing.py), and tiles of up to `tile` of them are multiplied by broadcasting. What a word of a
panel [K/step][2][lanes] and of a token holds, and how they are multiplied, is the micro-kernel's
(formats/micro.py).

Arithmetic of one output depends on its row and token alone: never on tile, worker or neighbours.

Zen 4, 128 experts of 768 x 2048 in FP8, about 32 tokens each, shares of core time: decoding 15 %
(some 9 cycles for 64 weights); without prefetching the next panel all takes 1.4 times as long.
Tried and dropped: decoding the next chunk inside the first tile, so that shuffles and dot products
overlap (slower as the compiler schedules it, 3 % faster interleaved by hand); moving 128-bit lanes
by loads instead of shuffles (no difference); tiles of 8, 10 or 13 tokens (no difference).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from llvmlite import ir

from hmc.codegen.formats.interleave import Chunk, Zeros
from hmc.codegen.formats.order import order_of
from hmc.codegen.formats.planes import ALL, ELEMENTS, Row, addresses, number
from hmc.codegen.formats.weights import row_bytes, span_bytes
from hmc.codegen.ir import F32, I8, I32, I64, Emitter, Value, const, vec
from hmc.codegen.panel.packing import BLOCK, each_tile, emit_pack, factors_at
from hmc.codegen.panel.tiling import CHUNK, VECTORS, Form
from hmc.codegen.vector import fsplat

_UNROLL = BLOCK // 4
_PTR = I8.as_pointer()


@dataclass(frozen=True)
class Rows:
    """One vector of weight rows: address and number of its first row, the rows after it, and what
    lies beside the codes of the matrix.

    Lanes past `last` repeat that row: their results are computed and never stored.
    """

    weights: Value
    beside: Value
    first: Value
    last: Value

    @property
    def words(self) -> list[Value]:
        """What routines are told of them."""
        return [self.weights, self.beside, self.first, self.last]


_WORDS = [_PTR, _PTR, I64, I64]
"""Types of `Rows.words`."""


class Panels:
    """The routines of one kernel: `pack` tokens, then `multiply` panel by panel, in scratch."""

    def __init__(self, e: Emitter, form: Form) -> None:
        self.e, self.form = e, form
        for count in range(1, form.tile + 1):
            self._emit_tile(count)
        for length, _ in form.lengths:
            self._emit_decode(length)
        self._emit_multiply()
        emit_pack(e, form)
        self._sources = e.local(I64, count=form.block)
        self.scratch = e.offset(e.arg["scratch"], e.b.mul(e.worker, const(form.scratch_bytes)))

    def rows(self, weights: Value, beside: Value, row: Value, rows: Value) -> Rows:
        """The vector of rows from `row` on, of a matrix of `rows`; past the end, its last row."""
        e, b, form = self.e, self.e.b, self.form
        end = b.sub(rows, const(1))
        row = e.minimum(row, end)
        codes = e.offset(weights, b.mul(row, const(row_bytes(form.spec.weight, form.k))))
        return Rows(codes, beside, row, b.sub(end, row))

    def pack(
        self, source: Callable[[Value], Value], tokens: Value, besides: Sequence[Value]
    ) -> None:
        """Copy `tokens` (at most `form.block`) bf16 rows, K long, from addresses `source(i)`;
        `besides` (i8*) lie beside the codes of the matrices that they are multiplied by.
        """
        e, form = self.e, self.form
        with e.for_range(0, tokens) as token:
            e.b.store(e.b.ptrtoint(source(token), I64), e.b.gep(self._sources, [token]))
        for copy, beside in enumerate(besides[: form.copies]):
            order = order_of(e, form.planes, beside) if form.ordered else beside
            x = e.offset(self.scratch, const(form.x_offset + copy * form.copy_bytes))
            e.run("pack", x, self._sources, tokens, order)

    def multiply(self, panel: tuple[Rows, Rows], tokens: Value, ahead: tuple[Value, Value]) -> None:
        """Totals of the packed tokens x two vectors of rows; meanwhile prefetch from `ahead` on."""
        words = [word for part in panel for word in part.words]
        self.e.run("multiply", self.scratch, tokens, *words, *ahead)

    def total(self, token: Value, vector: int) -> Value:
        """`<lanes x float>`: what `multiply` left for one token and one vector of rows."""
        e, form = self.e, self.form
        totals = e.offset(self.scratch, const(form.totals_offset))
        index = e.b.add(e.b.mul(token, const(form.rows)), const(vector * form.lanes))
        return e.load_vec(totals, index, F32, form.lanes, align=4)

    # -- routines ----------------------------------------------------------------------------------

    def _emit_multiply(self) -> None:
        """multiply(scratch, tokens, 2 x the words of rows, 2 x ahead)."""
        e, form = self.e, self.form
        kinds = [_PTR, I64, *_WORDS * VECTORS, *[_PTR] * VECTORS]
        with e.subroutine("multiply", *kinds) as (scratch, tokens, *words):
            b = e.b
            totals = e.offset(scratch, const(form.totals_offset))
            with e.for_range(0, b.mul(tokens, const(VECTORS))) as index:
                e.store(e.zeros(F32, form.lanes), totals, b.mul(index, const(form.lanes)), align=4)
            chunk = const(0)
            for length, chunks in form.lengths:
                with e.for_range(chunk, b.add(chunk, const(chunks))) as chunk_index:
                    self._chunk(length, chunk_index, scratch, tokens, words)
                chunk = const(chunks)

    def _chunk(
        self, length: int, chunk: Value, scratch: Value, tokens: Value, words: Sequence[Value]
    ) -> None:
        """Decode one chunk of K and multiply all tokens by it."""
        e, b, form = self.e, self.e.b, self.form
        moved = b.mul(chunk, const(form.chunk_bytes))
        scales = e.offset(scratch, const(form.scales_offset))
        each = len(_WORDS)
        for v in range(VECTORS):
            rows = words[each * v : each * (v + 1)]
            lane = const(v * form.lanes * 4)
            panel, factors = e.offset(scratch, lane), e.offset(scales, lane)
            e.run(f"decode{length}", panel, factors, chunk, *rows)
        step, group = form.micro.step, form.group
        groups, steps = 1, -(-length // (step * _UNROLL)) * _UNROLL
        if form.scaled and group < CHUNK:
            groups, steps = -(-length // group), group // step
        fetch = [
            e.offset(pointer, b.mul(moved, const(form.lanes)))
            for pointer in words[each * VECTORS :]
        ]
        copies = [
            e.offset(scratch, const(form.x_offset + copy * form.copy_bytes))
            for copy in range(form.copies)
        ]
        before = b.mul(chunk, b.mul(tokens, const(form.token_bytes)))
        totals = e.offset(scratch, const(form.totals_offset))
        with each_tile(e, form, tokens) as (tile, first, end):
            # Only the first tile fetches ahead; the others touch the panel, which is in L1.
            is_first = b.icmp_signed("==", tile, const(0))
            here = b.add(before, b.mul(first, const(form.token_bytes)))
            token = b.add(b.mul(chunk, tokens), first)
            values = [
                e.offset(totals, b.mul(first, const(form.rows * 4))),
                scratch,
                scales,
                const(groups),
                const(steps),
                *(b.select(is_first, pointer, scratch) for pointer in fetch),
                *(e.offset(copy, here) for copy in copies),
                *(b.bitcast(factors_at(e, form, copy, token), _PTR) for copy in copies),
            ]
            self._switch_tile(b.sub(end, first), values)

    def _switch_tile(self, tokens: Value, values: list[Value]) -> None:
        b = self.e.b
        done = self.e.function.append_basic_block("tile.done")
        switch = b.switch(tokens, done)
        for count in range(1, self.form.tile + 1):
            block = self.e.function.append_basic_block("tile")
            switch.add_case(const(count), block)
            b.position_at_end(block)
            self.e.run(f"tile{count}", *values)
            b.branch(done)
        b.position_at_end(done)

    def _emit_tile(self, count: int) -> None:
        """tile(totals, panel, scales, groups, steps, 2 x ahead, x and factors of each copy):
        `count` tokens, one chunk.
        """
        e, form = self.e, self.form
        lanes = form.lanes
        kinds = [_PTR, _PTR, _PTR, I64, I64, *[_PTR] * (VECTORS + 2 * form.copies)]
        with e.subroutine(f"tile{count}", *kinds) as values:
            totals, panel, scales, groups, steps, *pointers = values
            ahead, copies = pointers[:VECTORS], pointers[VECTORS:]
            xs, token_factors = copies[: form.copies], copies[form.copies :]
            b = e.b
            scaled = form.scaled
            none = form.micro.zero(e)
            cells = [(t, v) for t in range(count) for v in range(VECTORS)]

            def total_of(t: int, v: int) -> Value:
                return e.load_vec(totals, const((t * VECTORS + v) * lanes), F32, lanes, align=4)

            inside = form.held or not scaled  # totals are in registers all along
            held = {c: e.local(total_of(*c).type, total_of(*c)) for c in cells if inside}
            with e.for_range(0, groups) as group:
                sums = {c: e.local(none.type, none) for c in cells} if scaled else held
                first = b.mul(group, steps)
                with e.for_range(first, b.add(first, steps), _UNROLL) as step:
                    for pointer in ahead:
                        self._prefetch(pointer, step)
                    panel_step = e.offset(panel, b.mul(step, const(form.rows * 4)))
                    moved = b.mul(step, const(4 * count))  # a block of each token
                    x_steps = [e.offset(x, moved) for x in xs]
                    for u in range(_UNROLL):
                        weights = [
                            e.load_vec(
                                panel_step, const((u * VECTORS + v) * lanes), F32, lanes, align=4
                            )
                            for v in range(VECTORS)
                        ]
                        for t in range(count):
                            index = const(t * _UNROLL + u)
                            ones = [
                                e.splat(e.load(x_step, index, F32, align=4), lanes)
                                for x_step in x_steps
                            ]
                            for v in range(VECTORS):
                                slot, one = sums[t, v], ones[v % form.copies]
                                total = form.micro.multiply_add(e, weights[v], one, b.load(slot))
                                b.store(total, slot)
                scales_row = b.mul(group, const(form.rows))
                factors, minima = (
                    [
                        e.load_vec(
                            scales, b.add(scales_row, const(at + v * lanes)), F32, lanes, align=4
                        )
                        for v in range(VECTORS if there else 0)
                    ]
                    for at, there in ((0, scaled), (form.minima, form.micro.token_sums))
                )
                for t, v in cells:
                    own, numbers = t * form.token_numbers, token_factors[v % form.copies]
                    factor = partial(e.load, numbers, const(own), F32, align=4)
                    total = form.micro.finish(e, b.load(sums[t, v]), factor)
                    before = b.load(held[t, v]) if inside else total_of(t, v)
                    if minima:
                        at = b.add(group, const(own + form.micro.token_factors))
                        more = e.splat(e.load(numbers, at, F32, align=4), lanes)
                        before = e.fma(more, minima[v], before)
                    if scaled:
                        total = e.fma(total, factors[v], before)
                    if inside:
                        b.store(total, held[t, v])
                    else:
                        self._keep(totals, t, v, total)
            for (t, v), total in held.items():
                self._keep(totals, t, v, b.load(total))

    def _keep(self, totals: Value, token: int, vector: int, total: Value) -> None:
        place = const((token * VECTORS + vector) * self.form.lanes)
        self.e.store(total, totals, place, align=4)

    def _prefetch(self, pointer: Value, step: Value) -> None:
        """The lines that `_UNROLL` steps of one vector of rows take: all steps fetch a chunk."""
        e, form = self.e, self.form
        size = form.lanes * span_bytes(form.spec.weight, _UNROLL * form.micro.step * 8) // 8
        lines = -(-size // 64)
        moved = e.offset(pointer, e.b.mul(step, const(size // _UNROLL)))
        for line in range(lines):
            e.prefetch(e.offset(moved, const(line * 64)), 2)

    def _emit_decode(self, length: int) -> None:
        """decode(panel, scales, chunk, the words of rows): `length` weights of `lanes` rows."""
        e, form = self.e, self.form
        with e.subroutine(f"decode{length}", _PTR, _PTR, I64, *_WORDS) as values:
            panel, scales, chunk, *words = values
            b, vector = e.b, Rows(*words)
            order = [e.minimum(const(r), vector.last) for r in range(form.lanes)]
            rows = self._rows_of(vector, order)
            moved = b.mul(chunk, const(form.chunk_bytes))
            codes = [e.offset(row.codes, moved) for row in rows]
            k = b.mul(chunk, const(CHUNK))

            def factor(group: int) -> Value:
                return self._factor(rows, b.add(k, const(group * form.group)))

            work = Chunk(panel, form.rows, rows, codes, k, length)
            form.micro.decode(e, work, lambda: factor(0), self._zeros(rows, k))
            groups = range(-(-length // form.group) if form.scaled else 0)
            found = form.micro.scales(e, work) or [(factor(index), None) for index in groups]
            for index, (scale, minimum) in enumerate(found):
                e.store(scale, scales, const(index * form.rows), align=4)
                if minimum is not None:
                    e.store(minimum, scales, const(form.minima + index * form.rows), align=4)

    def _rows_of(self, vector: Rows, order: list[Value]) -> list[Row]:
        """The rows `order` after the first of `vector`."""
        e, b, form = self.e, self.e.b, self.form
        stride = const(row_bytes(form.spec.weight, form.k))
        bases = addresses(e, form.planes, vector.beside)
        planes = list(zip(form.planes, bases, strict=True))
        return [
            Row(
                e.offset(vector.weights, b.mul(r, stride)),
                tuple(plane.row(e, base, b.add(vector.first, r), form.k) for plane, base in planes),
            )
            for r in order
        ]

    def _factor(self, rows: list[Row], k: Value) -> Value:
        """`<lanes x float>`: what sums from column `k` on are multiplied by, of each row."""
        e, form = self.e, self.form
        total: Value = None
        for at in form.scales:
            one = self._gathered(rows, at, k)
            total = one if total is None else e.b.fmul(total, one)
        result = form.micro.result
        return total if result == 1.0 else e.b.fmul(total, fsplat(result, form.lanes))

    def _zeros(self, rows: list[Row], k: Value) -> Zeros | None:
        """What codes from column `k` on are less by."""
        e, form = self.e, self.form
        middle = fsplat(form.micro.middle, form.lanes)
        for at in form.zeros:

            def of(column: Value, at: int = at) -> Value:
                return e.b.fsub(middle, self._gathered(rows, at, e.b.add(k, column)))

            return Zeros(min(CHUNK, form.planes[at].columns), of)
        return None

    def _gathered(self, rows: list[Row], at: int, k: Value) -> Value:
        """`<lanes x float>`: the element of plane `at` that covers column `k` of each row."""
        e, form = self.e, self.form
        plane = form.planes[at]
        index = e.b.udiv(k, const(plane.columns))
        if (plane.rows % form.lanes == 0 and not form.straddles) or plane.rows == ALL:
            return e.splat(plane.load(e, rows[0].planes[at], index), form.lanes)
        kind = ELEMENTS.get(plane.dtype, I8)
        found: Value = ir.Constant(vec(kind, form.lanes), ir.Undefined)
        for r, row in enumerate(rows):
            one = e.load(row.planes[at], index, kind)
            found = e.b.insert_element(found, one, ir.Constant(I32, r))
        return number(e, plane.dtype, found)
