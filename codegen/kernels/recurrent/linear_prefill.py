"""`linear_attention_prefill`: many tokens of one sequence, in chunks, by products of matrices.

Of a chunk of a head, with K, Q, V its rows, D_i what rows of keys decay by up to token i, and S the
state before it (Yang et al., arXiv 2412.06464, section 3.3; with decays a column arXiv 2510.26692):

    A[i, j] = k_i . (decay of j + 1 ... i) k_j  for j < i,      P[i, j] the same of q_i for j <= i
    M = (1 + diag(beta) A)^-1 diag(beta),                       without the delta rule: 1
    R = V - (D K) S, without the delta rule: V;      N = M R
    Y = (D Q) S + P N;      S <- D_end S + (K decayed to the end)^T N

A, P, M and P M are made once a head and chunk (linear_pairs.py); what is left are three products a
block of columns. Decays enter as running products, and never as quotients: a decay of 0 is exact.
Tokens that a last chunk lacks are keys and queries of zeros.

One core of Zen 4, 512 tokens, 32 heads of 128 x 128 over 16 of keys, AVX-512: 23 ms with the delta
rule, 0.60 of the peak in f32 by the three products alone; decode's way, token by token, 28 to 40.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from hmc.codegen.ir import F32, Emitter, Value, const
from hmc.codegen.kernels.recurrent.heads import Heads
from hmc.codegen.kernels.recurrent.linear_form import Form
from hmc.codegen.kernels.recurrent.linear_pairs import Pairs
from hmc.codegen.vector import for_blocks, load_f32, store_f32

_UNROLLED = 4

Tile = list[list[Value]]
"""Vectors of sums by row."""


def emit_linear_attention_prefill(e: Emitter) -> None:
    """`linear_attention_prefill`: split by columns of heads, chunk by chunk."""
    b, heads, form = e.b, Heads(e), Form.of(e.spec)
    scratch = e.offset(e.arg["scratch"], b.mul(e.worker, const(form.offsets["end"])))
    parts = {name: e.offset(scratch, const(at)) for name, at in form.offsets.items()}
    pairs, columns = Pairs(e, heads, form, parts), _Columns(e, heads, form, parts)
    slot = e.load_int(e.arg["sequence"], const(0))
    tokens = e.arg["tokens"]
    with heads.share() as (head, low, high), e.for_range(0, tokens, form.chunk) as first:
        count = e.minimum(b.sub(tokens, first), const(form.chunk))
        pairs.make(head, first, count)
        state = heads.state(slot, head)

        def block(column: Value, width: int) -> None:
            columns.take(state, head, first, count, column, width)

        heads.columns(low, high, form.block, block)


class _Columns:
    """A block of columns of a head's state through a chunk."""

    def __init__(self, e: Emitter, heads: Heads, form: Form, parts: dict[str, Value]) -> None:
        self.e, self.heads, self.form, self.parts = e, heads, form, parts

    def take(
        self, state: Value, head: Value, first: Value, count: Value, column: Value, width: int
    ) -> None:
        """The results of `count` tokens from `first` on, and the state after them."""
        e, b, form, heads, parts = self.e, self.e.b, self.form, self.heads, self.parts
        lanes, chunk = form.lanes, form.chunk
        starts = range(0, width, lanes)
        counts = [min(lanes, width - start) for start in starts]
        zeros = e.zeros(F32, lanes)
        state = e.at(state, column, F32)
        last = b.sub(count, const(1))

        def of_token(name: str, row: Value) -> Value:
            token = b.add(first, e.minimum(row, last))
            return e.at(heads.row(name, token, head), column, F32)

        def kept(name: str, row: Value) -> list[Value]:
            base = b.mul(row, const(form.block))
            return [e.load_vec(parts[name], b.add(base, const(at)), F32, lanes) for at in starts]

        def keep(name: str, row: Value, found: list[Value]) -> None:
            base = b.mul(row, const(form.block))
            for at, value in zip(starts, found, strict=True):
                e.store(value, parts[name], b.add(base, const(at)))

        def values(row: Value) -> list[Value]:
            place = of_token("v", row)
            return [
                load_f32(e, "f32", place, const(at), n)
                for at, n in zip(starts, counts, strict=True)
            ]

        def none(row: Value) -> list[Value]:
            return [zeros] * len(counts)

        def rest(row: Value, found: list[Value]) -> None:
            keep("rest", row, [b.fsub(v, each) for v, each in zip(values(row), found, strict=True)])

        def result(row: Value, found: list[Value]) -> None:
            with b.if_then(b.icmp_signed("<", row, count)):
                place = of_token("y", row)
                for at, n, value in zip(starts, counts, found, strict=True):
                    store_f32(e, "f32", value, place, const(at), n)

        def held(row: Value) -> list[Value]:
            base = b.mul(row, const(heads.values))
            factor = e.splat(e.load(parts["whole"], row, F32), lanes)
            return [
                b.fmul(load_f32(e, "f32", state, b.add(base, const(at)), n), factor)
                for at, n in zip(starts, counts, strict=True)
            ]

        def hold(row: Value, found: list[Value]) -> None:
            base = b.mul(row, const(heads.values))
            for at, n, value in zip(starts, counts, found, strict=True):
                store_f32(e, "f32", value, state, b.add(base, const(at)), n)

        keys = parts["left"]
        queries = e.offset(keys, const(4 * chunk * form.pitch))
        of_state = (state, heads.values, counts)
        of_block = [lanes] * len(counts)
        if heads.delta:
            self._product(chunk, heads.keys, (keys, form.pitch), of_state, none, rest)
        else:
            with e.for_range(0, chunk) as row:
                keep("new", row, values(row))
        self._product(
            chunk,
            heads.keys,
            (queries, form.pitch),
            of_state,
            none,
            lambda row, found: keep("sums", row, found),
        )
        mix, source = parts["mix"], "rest" if heads.delta else "new"
        right = (parts[source], form.block, of_block)
        if heads.delta:
            self._product(
                chunk, chunk, (mix, chunk), right, none, lambda row, found: keep("new", row, found)
            )
        mixed = e.offset(mix, const(4 * chunk * chunk))
        self._product(chunk, chunk, (mixed, chunk), right, lambda row: kept("sums", row), result)
        new = (parts["new"], form.block, of_block)
        self._product(heads.keys, chunk, (parts["ends"], chunk), new, held, hold)

    def _product(
        self,
        rows: int,
        depth: int,
        left: tuple[Value, int],
        right: tuple[Value, int, list[int]],
        begin: Callable[[Value], list[Value]],
        end: Callable[[Value, list[Value]], None],
    ) -> None:
        """`end(row, begin(row) + left[row] . right)` of every row; left and right are (address,
        elements from row to row), of right also how many lanes each vector of a row has.
        """
        e, b = self.e, self.e.b
        most = self.form.high  # or somewhat less, where that leaves no rest
        high = next((n for n in range(most, most // 2, -1) if rows % n == 0), most)
        unrolled = gcd(depth, _UNROLLED)

        def tile(row: Value, count: int) -> None:
            numbers = [b.add(row, const(at)) for at in range(count)]
            sums = [[e.local(each.type, each) for each in begin(number)] for number in numbers]
            line = e.at(left[0], b.mul(row, const(left[1])), F32)
            with e.for_range(0, depth, unrolled) as start:
                for step in range(unrolled):
                    self._outer(sums, line, left[1], right, b.add(start, const(step)))
            for number, each in zip(numbers, sums, strict=True):
                end(number, [b.load(one) for one in each])

        for_blocks(e, rows, high, tile)

    def _outer(
        self,
        sums: Tile,
        line: Value,
        pitch: int,
        right: tuple[Value, int, list[int]],
        step: Value,
    ) -> None:
        """Add a column of the left tile times a row of the right one."""
        e, b = self.e, self.e.b
        base = b.mul(step, const(right[1]))
        vectors = [
            load_f32(e, "f32", right[0], b.add(base, const(at * e.lanes)), count)
            for at, count in enumerate(right[2])
        ]
        for row, each in enumerate(sums):
            factor = e.splat(e.load(line, b.add(step, const(row * pitch)), F32), e.lanes)
            for place, vector in zip(each, vectors, strict=True):
                b.store(e.fma(factor, vector, b.load(place)), place)
