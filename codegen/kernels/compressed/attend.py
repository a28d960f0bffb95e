"""Attention of each token over the last rows of its sequence and over compressed rows: keys that
are the values too, the same for all heads.

A task is (token, some heads). It lists the addresses of the rows that the token sees, scores them,
and sums them up column by column; all in the order of the list, so that results depend on nothing
but the token.
"""

from __future__ import annotations

from functools import partial

from llvmlite import ir

from hmc.codegen.ir import F32, I16, I32, I64, Emitter, Value, const, fconst, vec
from hmc.codegen.isa import TIERS
from hmc.codegen.kernels.compressed.rows import NEVER, RowPages
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import exp, for_blocks, for_strips, load_f32, store_f32

_MEMBERS = 4
_PAD = 64


def _members(spec: KernelSpec) -> int:
    """Heads of a task."""
    return max(count for count in range(1, _MEMBERS + 1) if spec["heads"] % count == 0)


def most_rows(spec: KernelSpec, max_context: int) -> int:
    """Rows that a token sees at most, padded."""
    rows = spec["window"]
    if ratio := spec.get("ratio"):
        rows += min(max_context // ratio, spec.get("index_topk") or max_context)
    return (rows // _PAD + 2) * _PAD


def attend_scratch_bytes(spec: KernelSpec, max_context: int) -> int:
    """Bytes of `scratch` of one worker: addresses and weights of all rows that a token sees."""
    return most_rows(spec, max_context) * (8 + 4 * _members(spec))


class _Task:
    """Code for some heads of one token."""

    def __init__(self, e: Emitter, prompt: bool) -> None:
        self.e, self.prompt, self.members = e, prompt, _members(e.spec)
        self.dim, self.window = e.spec["head_dim"], e.spec["window"]
        most = e.arg["most"]
        per = e.b.mul(most, const(8 + 4 * self.members))
        self.rows = e.offset(e.arg["scratch"], e.b.mul(e.worker, per))
        after = e.offset(self.rows, e.b.mul(most, const(8)))
        self.weights = [
            e.offset(after, e.b.mul(most, const(4 * member))) for member in range(self.members)
        ]

    def emit(self, token: Value, group: Value) -> None:
        """The whole task; y = 0 at a negative position."""
        e, b = self.e, self.e.b
        position = e.load_int(e.arg["positions"], token)
        count = self._list(token, position)
        head = b.mul(group, const(self.members))
        y = e.row("y", token, head, self.dim)
        shares = self._weigh(token, head, count)
        self._sum(count, shares, y)

    def _list(self, token: Value, position: Value) -> Value:
        """Addresses of all rows that the token sees; how many."""
        e, b, window = self.e, self.e.b, const(self.window)
        end = e.positive(b.add(position, const(1)))
        first = e.positive(b.sub(end, window))
        if self.prompt:
            start = b.sub(e.load_int(e.arg["positions"], const(0)), window)
            base = e.at(e.arg["keys"], const(0), I16)
        else:
            slot = b.mul(e.load_int(e.arg["sequence"], token), e.arg["keys_stride"])
            base = e.at(e.arg["keys"], slot, I16)
        with e.for_range(first, end) as place:
            row = b.sub(place, start) if self.prompt else b.urem(place, window)
            self._keep(b.sub(place, first), e.at(base, b.mul(row, const(self.dim)), I16))
        seen = b.sub(end, first)
        if not e.spec.get("ratio"):
            return seen
        pages = RowPages(e, token, self.dim)
        count = b.udiv(end, const(e.spec["ratio"]))
        most = e.spec.get("index_topk")
        if most:
            count = e.minimum(count, const(most))
        with e.for_range(0, count) as number:
            found = number
            if most:
                found = e.load_int(e.arg["chosen"], b.add(b.mul(token, const(most)), number))
            self._keep(b.add(seen, number), pages.of(e.arg["rows"], found))
        return b.add(seen, count)

    def _keep(self, number: Value, address: Value) -> None:
        self.e.store(self.e.b.ptrtoint(address, I64), self.rows, number, align=8)

    def _row(self, number: Value) -> Value:
        e = self.e
        return e.b.inttoptr(e.load(self.rows, number, I64, align=8), I16.as_pointer())

    def _weigh(self, token: Value, head: Value, count: Value) -> list[Value]:
        """Weights of all rows, not yet divided; by what to multiply their sums, of each head."""
        e, b, lanes = self.e, self.e.b, self.e.lanes
        queries = [
            e.row("q", token, b.add(head, const(member)), self.dim)
            for member in range(self.members)
        ]
        tops = [e.local(F32) for _ in queries]
        for member, top in enumerate(tops):
            b.store(e.load(e.arg["sinks"], b.add(head, const(member)), F32), top)
        sums = [e.local(vec(F32, lanes)) for _ in queries]
        with e.for_range(0, count) as number:
            row = self._row(number)
            for each in sums:
                b.store(e.zeros(F32, lanes), each)

            def strip(index: Value, used: int, way: int) -> None:
                key = load_f32(e, "bf16", row, index, used)
                for query, each in zip(queries, sums, strict=True):
                    b.store(e.fma(load_f32(e, "f32", query, index, used), key, b.load(each)), each)

            for_strips(e, self.dim, lanes, strip)
            for each, top, weights in zip(sums, tops, self.weights, strict=True):
                score = b.fmul(e.reduce_add(b.load(each)), e.arg["scale"])
                e.store(score, weights, number, align=4)
                old = b.load(top)
                b.store(b.select(b.fcmp_ordered(">", score, old), score, old), top)
        padded = b.and_(b.add(count, const(lanes - 1)), const(-lanes))
        shares = []
        for member, (top, weights) in enumerate(zip(tops, self.weights, strict=True)):
            with e.for_range(count, padded) as number:
                e.store(fconst(NEVER), weights, number, align=4)
            peak = e.splat(b.load(top), lanes)
            total = e.local(vec(F32, lanes))
            b.store(e.zeros(F32, lanes), total)
            with e.for_range(0, padded, lanes) as index:
                raised = exp(e, b.fsub(e.load_vec(weights, index, F32, lanes, align=4), peak))
                e.store(raised, weights, index, align=4)
                b.store(b.fadd(b.load(total), raised), total)
            sink = e.load(e.arg["sinks"], b.add(head, const(member)), F32)
            rest = b.extract_element(
                exp(e, b.fsub(e.splat(sink, lanes), peak)), ir.Constant(I32, 0)
            )
            shares.append(b.fdiv(fconst(1.0), b.fadd(e.reduce_add(b.load(total)), rest)))
        return shares

    def _sum(self, count: Value, shares: list[Value], y: Value) -> None:
        """y = the weighed sums of all rows."""
        e, b, lanes = self.e, self.e.b, self.e.lanes
        ways = max(1, TIERS[e.spec.isa].registers // 2 // self.members)

        def columns(base: Value, size: int) -> None:
            cut = range(0, size, lanes)
            sums = [[e.local(vec(F32, lanes)) for _ in cut] for _ in shares]
            for each in sums:
                for slot in each:
                    b.store(e.zeros(F32, lanes), slot)
            with e.for_range(0, count) as number:
                row = self._row(number)
                values = [
                    load_f32(e, "bf16", row, b.add(base, const(at)), min(lanes, size - at))
                    for at in cut
                ]
                for each, weights in zip(sums, self.weights, strict=True):
                    weight = e.splat(e.load(weights, number, F32, align=4), lanes)
                    for slot, value in zip(each, values, strict=True):
                        b.store(e.fma(weight, value, b.load(slot)), slot)
            for member, (each, share) in enumerate(zip(sums, shares, strict=True)):
                for slot, at in zip(each, cut, strict=True):
                    value = b.fmul(b.load(slot), e.splat(share, lanes))
                    place = b.add(base, const(member * self.dim + at))
                    store_f32(e, "f32", value, y, place, min(lanes, size - at))

        for_blocks(e, self.dim, ways * lanes, columns)


def _emit(e: Emitter, *, prompt: bool) -> None:
    b, groups = e.b, const(e.spec["heads"] // _members(e.spec))
    task = _Task(e, prompt)
    start, stop = e.split(b.mul(e.arg["tokens"], groups))
    with e.for_range(start, stop) as item:
        task.emit(b.udiv(item, groups), b.urem(item, groups))


emit_attend_few = partial(_emit, prompt=False)
emit_attend_prefill = partial(_emit, prompt=True)
