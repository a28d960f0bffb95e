"""`experts_gate_up`, `experts_down`: routed experts of 1 to 16 tokens; every weight is read once
for all its tokens.

Every worker groups the (token, slot) pairs by expert on its own stack, in order of first
appearance, and takes its share: of first halves a contiguous slice of all rows of all active
experts laid end to end, or where workers are of several NUMA nodes of the rows that are its node's
(codegen/decode/teams.py); of second halves the same rows of every active expert. Second halves
leave one f32 row for each pair in `scratch`; only then are a token's rows weighted and added, in
the order of its slots, so that a token's result does not depend on its neighbours. Slots whose id
is negative belong to experts that are computed elsewhere: they are left out of all this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from hmc.codegen.decode.teams import Own
from hmc.codegen.decode.tiles import BYTES, FLOATS, GRAIN, Tiles, pointers
from hmc.codegen.expr import has_gate, weighs
from hmc.codegen.formats.forms import dot_of
from hmc.codegen.ir import F32, I32, I64, Emitter, Value, const, vec
from hmc.codegen.kernels.matmul.gate_up import Buffers
from hmc.codegen.spec import KernelSpec

TABLE_WIDTH = 6
GATE, UP, DOWN = 0, 2, 4
"""Columns of the expert table; scales follow each."""
BIASES = ("gate_bias", "up_bias")
"""Arguments with what is added to the products that are activated."""


def scratch_bytes(spec: KernelSpec) -> int:
    """Bytes `scratch` must have: `experts_down` keeps f32 [tokens * top_k, n] there,
    `experts_gate_up` nothing.
    """
    return 4 * spec["tokens"] * spec["top_k"] * spec["n"] if spec.op == "experts_down" else 0


def emit_experts_gate_up(e: Emitter) -> None:
    """IR of `experts_gate_up`; expr of gate, up and weight; params k, n, top_k, experts, tokens (,
    biased) (, group, scale_dtype for int4).
    """
    b, spec = e.b, e.spec
    n = spec["n"]
    tiles = Tiles(e, dot_of(spec, spec["k"]), spec["tokens"])
    groups = Groups(e)
    inputs = _Inputs(e, tiles, has_gate(spec.expr))
    ys = pointers(e, spec["tokens"])
    columns = (GATE, UP) if has_gate(spec.expr) else (UP,)
    buffers = Buffers(tiles, spec["tokens"], len(columns))
    shares = e.local(F32, count=spec["tokens"]) if weighs(spec.expr) else None
    # The team's row blocks of the first active expert, then of the second, and so on: this worker's
    # share of them all.
    own = Own.of(e, e.arg["teams"], const(-(-n // GRAIN)))
    begin, end = own.split(groups.active)
    blocks = b.sub(own.last, own.first)
    blocks = b.select(b.icmp_signed(">", blocks, const(1)), blocks, const(1))  # none: begin is end
    through = b.udiv(b.add(end, b.sub(blocks, const(1))), blocks)
    rows = e.minimum(b.mul(own.last, const(GRAIN)), const(n))
    with e.for_range(b.udiv(begin, blocks), through) as index:
        before = b.sub(b.mul(index, blocks), own.first)
        start = b.mul(e.maximum(b.sub(begin, before), own.first), const(GRAIN))
        stop = e.minimum(b.mul(b.sub(end, before), const(GRAIN)), rows)
        matrices = [groups.matrix(index, column) for column in columns]
        skipped = b.mul(own.first, const(GRAIN * tiles.dot.row_bytes))
        following = e.offset(groups.address(groups.after(index), columns[0]), skipped)
        biases = []
        if spec.get("biased"):
            place = b.mul(groups.expert(index), const(4 * n))
            biases = [e.offset(e.arg[name], place) for name in BIASES[-len(columns) :]]
        with groups.parts(index) as (first, count):
            with groups.members(first, count) as (place, pair):
                inputs.put(place, pair, matrices)
                b.store(e.offset(e.arg["act"], b.mul(pair, const(2 * n))), b.gep(ys, [place]))
                if shares is not None:
                    b.store(e.load(e.arg["routing"], pair, F32), b.gep(shares, [place]))
            xs = inputs.xs
            buffers.activate(matrices, start, stop, xs, ys, count, following, biases, shares)


def emit_experts_down(e: Emitter) -> None:
    """IR of `experts_down`; params k, n, top_k, experts, tokens (, biased; group and scale_dtype
    for int4).
    """
    b, spec = e.b, e.spec
    n, top_k = spec["n"], spec["top_k"]
    tiles = Tiles(e, dot_of(spec, spec["k"]), spec["tokens"])
    groups = Groups(e)
    prepared, xs = tiles.room(spec["tokens"]), pointers(e, spec["tokens"])
    scratch = b.bitcast(e.arg["scratch"], FLOATS)
    start, stop = e.split(const(n), GRAIN)
    skipped = b.mul(start, const(tiles.dot.row_bytes))
    with e.for_range(0, groups.active) as index:
        down = groups.matrix(index, DOWN)
        following = e.offset(groups.address(groups.after(index), DOWN), skipped)
        with groups.parts(index) as (first, count):
            with groups.members(first, count) as (place, pair):
                x, row = tiles.place(prepared, place), b.mul(pair, const(2 * spec["k"]))
                tiles.prepare_row(e.offset(e.arg["act"], row), x, down[1])
                b.store(x, b.gep(xs, [place]))
            out = b.gep(scratch, [b.add(b.mul(first, const(n)), start)])
            tiles.matvec(down, start, stop, xs, count, out, const(n), following)
    with e.for_range(0, e.arg["tokens"]) as token:
        y = b.add(b.mul(token, e.arg["y_stride"]), start)
        first = b.mul(token, const(top_k))
        for index, width in e.in_vectors(b.sub(stop, start), 16):
            kind = F32 if width == 1 else vec(F32, width)
            total = e.local(kind, ir.Constant(kind, None if width > 1 else 0.0))
            with e.for_range(0, top_k) as slot:
                pair = b.add(first, slot)
                expert = e.load_int(e.arg["ids"], pair)
                with b.if_then(b.icmp_signed(">=", expert, const(0))):
                    place = b.add(b.add(b.mul(groups.position(pair), const(n)), start), index)
                    share = e.load(e.arg["routing"], pair, F32)
                    share = e.splat(share, width) if width > 1 else share
                    value = e.load_some(e.arg["scratch"], place, F32, width)
                    if spec.get("biased"):
                        row = b.add(b.add(b.mul(expert, const(n)), start), index)
                        value = b.fadd(value, e.load_some(e.arg["bias"], row, F32, width))
                    b.store(e.fma(share, value, b.load(total)), total)
            e.store(b.load(total), e.arg["y"], b.add(y, index))


class _Inputs:
    """Prepared tokens of the expert under way, `xs` i8** for all matrices, or where columns lie in
    an order one for gate (if `gated`) and one for up: then they are prepared for every expert, else
    once for all.
    """

    def __init__(self, e: Emitter, tiles: Tiles, gated: bool) -> None:
        self.e, self._tiles, most = e, tiles, e.spec["tokens"]
        self.xs = [pointers(e, most) for _ in range(1 + (tiles.ordered and gated))]
        if tiles.ordered:
            self._rooms = [tiles.room(most) for _ in self.xs]
        else:
            tokens, stride = e.arg["tokens"], e.arg["x_stride"]
            self._rooms = [tiles.prepare(e.arg["x"], tokens, stride, most)]

    def put(self, place: Value, pair: Value, matrices: Sequence[tuple[Value, Value]]) -> None:
        """The token of `pair` at `place`, for the `matrices`."""
        e, b, tiles = self.e, self.e.b, self._tiles
        token = b.udiv(pair, const(e.spec["top_k"]))
        row = place if tiles.ordered else token
        for xs, room, (_, beside) in zip(self.xs, self._rooms, matrices, strict=False):
            x = tiles.place(room, row)
            if tiles.ordered:
                stride = b.shl(e.arg["x_stride"], const(1))
                tiles.prepare_row(e.offset(e.arg["x"], b.mul(token, stride)), x, beside)
            b.store(x, b.gep(xs, [place]))


class Groups:
    """The (token, slot) pairs of `ids` that have an expert, grouped by it: i32 arrays on the stack,
    and the code that fills them.

    `active` groups (i64) in order of first appearance, pairs (token * top_k + slot) ascending in
    each. A group is worked on in parts of as many pairs as there may be tokens: all of it, unless
    ids name an expert twice for a token. So what is held of each pair takes little of the stack.
    """

    def __init__(self, e: Emitter) -> None:
        b, spec = e.b, e.spec
        self.e = e
        most = spec["tokens"] * spec["top_k"]
        self.pairs = b.mul(e.arg["tokens"], const(spec["top_k"]))
        experts = -(-spec["experts"] // 16) * 16
        group_of, self._expert, self._start, self._order, self._position = (
            b.bitcast(e.local(I32, count=count), BYTES)
            for count in (experts, most, most + 1, most, most)
        )
        with e.for_range(0, experts, 16) as expert:
            e.store(e.zeros(I32, 16), group_of, expert)
        # Count: group_of[expert] is group + 1, _start[group + 1] its size.
        active = e.local(I64, const(0))
        with self._chosen() as (pair, expert):
            with b.if_then(b.icmp_signed("==", e.load_int(group_of, expert), const(0))):
                new = b.load(active)
                b.store(b.add(new, const(1)), active)
                e.store_int(b.add(new, const(1)), group_of, expert)
                e.store_int(expert, self._expert, new)
                e.store_int(const(0), self._start, b.add(new, const(1)))
            group = e.load_int(group_of, expert)
            e.store_int(b.add(e.load_int(self._start, group), const(1)), self._start, group)
        self.active = b.load(active)
        # Sum up, then place; placing moves each group's start to its end, which is the next one's
        # start.
        total = e.local(I64, const(0))
        with e.for_range(0, self.active) as group:
            size = e.load_int(self._start, b.add(group, const(1)))
            e.store_int(b.load(total), self._start, b.add(group, const(1)))
            b.store(b.add(b.load(total), size), total)
        with self._chosen() as (pair, expert):
            group = e.load_int(group_of, expert)
            place = e.load_int(self._start, group)
            e.store_int(pair, self._order, place)
            e.store_int(place, self._position, pair)
            e.store_int(b.add(place, const(1)), self._start, group)
        e.store_int(const(0), self._start, const(0))

    @contextmanager
    def _chosen(self) -> Iterator[tuple[Value, Value]]:
        """A loop over the pairs that have an expert: yields (pair, expert)."""
        e = self.e
        with e.for_range(0, self.pairs) as pair:
            expert = e.load_int(e.arg["ids"], pair)
            with e.b.if_then(e.b.icmp_signed(">=", expert, const(0))):
                yield pair, expert

    def start(self, index: Value) -> Value:
        """Place of the first pair of group `index`."""
        return self.e.load_int(self._start, index)

    @contextmanager
    def parts(self, index: Value) -> Iterator[tuple[Value, Value]]:
        """A loop over group `index`: yields (place of a part's first pair among all, its pairs)."""
        b, most = self.e.b, self.e.spec["tokens"]
        end = self.start(b.add(index, const(1)))
        with self.e.for_range(self.start(index), end, most) as first:
            yield first, self.e.minimum(b.sub(end, first), const(most))

    def position(self, pair: Value) -> Value:
        """Place of `pair`, which must have an expert, among all, group after group."""
        return self.e.load_int(self._position, pair)

    @contextmanager
    def members(self, first: Value, count: Value) -> Iterator[tuple[Value, Value]]:
        """A loop over a part: yields (place in it, pair)."""
        with self.e.for_range(0, count) as place:
            yield place, self.e.load_int(self._order, self.e.b.add(first, place))

    def after(self, index: Value) -> Value:
        """The group that follows `index`, or `index` for the last."""
        return self.e.minimum(self.e.b.add(index, const(1)), self.e.b.sub(self.active, const(1)))

    def expert(self, index: Value) -> Value:
        """The expert of group `index`."""
        return self.e.load_int(self._expert, index)

    def address(self, index: Value, column: int) -> Value:
        """i8* in `column` of the expert table, for the expert of group `index`."""
        e = self.e
        place = e.b.mul(self.expert(index), const(TABLE_WIDTH))
        return e.b.inttoptr(e.load(e.arg["table"], e.b.add(place, const(column)), I64), BYTES)

    def matrix(self, index: Value, column: int) -> tuple[Value, Value]:
        """Weights and scales of the matrix in `column`."""
        return self.address(index, column), self.address(index, column + 1)
