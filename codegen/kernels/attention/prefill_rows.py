"""A unit of prefill attention: packing its queries, writing its results.

Rows of a unit are (token, head of the group), token by token. Rows past the last repeat it, so that
every lane computes something and writing it again changes nothing.
"""

from __future__ import annotations

import math

from hmc.codegen.formats.interleave import transpose
from hmc.codegen.ir import F32, I8, I16, Emitter, Value, const
from hmc.codegen.kernels.attention.attend_scores import round_bf16
from hmc.codegen.kernels.attention.options import first_seen, grown
from hmc.codegen.kernels.attention.prefill_form import Form
from hmc.codegen.kernels.attention.prefill_tiles import FIRST, LOWEST, MAXIMUM, SUM
from hmc.codegen.vector import for_blocks, fsplat, load_part, store_f32, store_part

_BYTES = I8.as_pointer()


class Unit:
    """`count` tokens from `first` on against the keys of `kv_head`; `past` positions lie before
    token 0. `begin` is the first position that some of them see, `end` the one behind the last,
    `rows` how many queries there are.
    """

    def __init__(
        self,
        e: Emitter,
        form: Form,
        scratch: Value,
        past: Value,
        first: Value,
        count: Value,
        kv_head: Value,
    ) -> None:
        b = e.b
        self.e, self.form = e, form
        self.scratch, self.kv_head = scratch, kv_head
        self.first, self.count = first, count
        self._position = b.add(past, first)
        self.begin = first_seen(e, self._position)
        self.end = b.add(self._position, count)
        self.rows = b.mul(count, const(form.group))
        self.panels = b.udiv(b.add(self.rows, const(form.panel - 1)), const(form.panel))

    def first_position(self, panel: Value) -> Value:
        """Least position of a panel's rows."""
        row = self.e.b.mul(panel, const(self.form.panel))
        return self._position_of(row)

    def last_position(self, panel: Value) -> Value:
        """Largest position of a panel's rows."""
        after = self.e.b.mul(self.e.b.add(panel, const(1)), const(self.form.panel))
        return self._position_of(self.e.b.sub(after, const(1)))

    def _position_of(self, row: Value) -> Value:
        b = self.e.b
        row = self.e.minimum(row, b.sub(self.rows, const(1)))
        return b.add(self._position, b.udiv(row, const(self.form.group)))

    def part(self, name: str, index: Value, words: int) -> Value:
        """Address of piece `index`, of `words` words, of a part of the scratch."""
        e, b = self.e, self.e.b
        offset = b.add(const(self.form.offsets[name]), b.mul(index, const(4 * words)))
        return e.offset(self.scratch, offset)

    # -- queries -----------------------------------------------------------------------------------

    def _row_index(self, panel: Value, vector: Value, lane: Value) -> tuple[Value, Value]:
        """Token and head of a row."""
        b, form = self.e.b, self.form
        row = b.add(b.mul(panel, const(form.panel)), b.mul(vector, const(form.lanes)))
        row = self.e.minimum(b.add(row, lane), b.sub(self.rows, const(1)))
        token = b.add(self.first, b.udiv(row, const(form.group)))
        head = b.add(b.mul(self.kv_head, const(form.group)), b.urem(row, const(form.group)))
        return token, head

    def pack_queries(self) -> None:
        """queries[panel][term][key step][row], scaled; panels' states before the first tile."""
        e, b, form = self.e, self.e.b, self.form
        lanes = form.lanes
        with e.for_range(0, self.panels) as panel:
            state = self.part("states", panel, form.state_words)
            results = self.part("results", panel, form.result_words)
            with e.for_range(0, const(form.result_words), lanes) as index:
                e.store(e.zeros(F32, lanes), results, index, align=4)
            with e.for_range(0, form.vectors) as vector:
                at = b.mul(vector, const(lanes))
                self._split_queries(panel, vector, e.offset(state, b.mul(at, const(4))))
                sinks = e.spec.get("sinks")
                for field, value in ((SUM, 1.0),) if sinks else ((MAXIMUM, LOWEST), (SUM, 0.0)):
                    where = b.add(at, const(field * form.panel))
                    e.store(fsplat(value, lanes), state, where, align=4)
                source = self.part("keys", const(0), 0)
                queries = self.part("queries", panel, form.query_words)
                words = form.terms * form.query_steps
                with e.for_range(0, words, lanes) as step:
                    rows = [
                        e.load_vec(source, b.add(step, const(lane * words)), form.word, lanes, 4)
                        for lane in range(lanes)
                    ]
                    target = b.add(b.mul(step, const(form.panel)), at)
                    for index, column in enumerate(transpose(e, rows)):
                        place = b.add(target, const(index * form.panel))
                        e.store(column, queries, place, align=4)

    def _query(self, token: Value, head: Value) -> Value:
        """Address of a row's query."""
        return self.e.row("q", token, head, self.form.key)

    def _split_queries(self, panel: Value, vector: Value, state: Value) -> None:
        """Rows of one vector, scaled, as [row][term][key step] where keys will be; and of their
        `state` positions, the first that they see, and a sink as the largest score.

        They go through memory because sixteen rows in all their terms exceed the registers.
        """
        e, b, form = self.e, self.e.b, self.form
        square = form.step * form.lanes
        scale = e.arg.get("scale", F32(1.0))
        if form.value and not e.spec.expr:
            scale = b.fmul(scale, F32(math.log2(math.e)))
        with e.for_range(0, form.lanes) as lane:
            token, head = self._row_index(panel, vector, lane)
            position = b.add(self._position, b.sub(token, self.first))
            e.store_int(position, state, lane, align=4)
            if form.bounded:
                at = b.add(lane, const(FIRST * form.panel))
                e.store_int(first_seen(e, position), state, at, align=4)
            if e.spec.get("sinks"):
                sink = b.fmul(e.load(e.arg["sinks"], head, F32), F32(math.log2(math.e)))
                e.store(sink, state, b.add(lane, const(MAXIMUM * form.panel)), align=4)
            factor = e.splat(grown(e, scale, position), square)
            source = self._query(token, head)
            after = self._query(*self._row_index(panel, vector, b.add(lane, const(form.lanes))))
            target = self.part("keys", lane, form.terms * form.query_steps)

            def split(start: Value, size: int) -> None:
                for ahead in range(0, size, 16):  # no hardware prefetcher foresees the next token
                    e.prefetch(b.gep(after, [b.add(start, const(ahead))]), 3)
                value = b.fmul(load_part(e, source, start, F32, size, square), factor)
                for term in range(form.terms):
                    if form.dot:
                        bits = round_bf16(e, value)
                        e.store(bits, target, b.add(start, const(2 * term * form.query_steps)))
                        value = b.fsub(value, e.bf16_to_f32(bits))
                    else:
                        e.store(value, target, start, align=4)

            for_blocks(e, form.key, square, split)

    # -- results -----------------------------------------------------------------------------------

    def write_results(self) -> None:
        """y bf16 = results / sums, row by row."""
        e, b, form = self.e, self.e.b, self.form
        lanes = form.lanes
        with (
            e.for_range(0, self.panels) as panel,
            e.for_range(0, form.vectors) as vector,
        ):
            state = self.part("states", panel, form.state_words)
            results = self.part("results", panel, form.result_words)
            at = b.mul(vector, const(lanes))
            total = e.load_vec(state, b.add(at, const(SUM * form.panel)), F32, lanes, align=4)
            share = b.fdiv(fsplat(1.0, lanes), total)
            rows = []
            for lane in range(lanes):
                token, head = self._row_index(panel, vector, const(lane))
                rows.append(e.row("y", token, head, form.value, I16))

            def write(start: Value, count: int) -> None:
                base = b.add(b.mul(start, const(form.panel)), at)
                columns: list[Value] = [e.zeros(F32, lanes)] * lanes
                for index in range(count):
                    place = b.add(base, const(index * form.panel))
                    value = e.load_vec(results, place, F32, lanes, align=4)
                    columns[index] = b.fmul(value, share)
                for row, values in zip(rows, transpose(e, columns), strict=True):
                    if form.dot:
                        store_part(e, round_bf16(e, values), row, start, count)
                    else:
                        store_f32(e, "bf16", values, row, start, count)

            for_blocks(e, form.value, lanes, write)
