"""What the tokens of a chunk of a head have to do with each other, for `linear_attention_prefill`.

Keys that came before decay token by token in the lanes of vectors, one row of keys each: a lane is
a token of the chunk, filled when its turn comes.
"""

from __future__ import annotations

from hmc.codegen.ir import F32, I32, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.kernels.recurrent.heads import Heads
from hmc.codegen.kernels.recurrent.linear_form import Form
from hmc.codegen.vector import for_strips, fsplat, load_f32


class Pairs:
    """Fills the parts of scratch that all columns of a head read."""

    def __init__(self, e: Emitter, heads: Heads, form: Form, parts: dict[str, Value]) -> None:
        self.e, self.heads, self.form, self.parts = e, heads, form, parts

    def make(self, head: Value, first: Value, count: Value) -> None:
        """Of `count` tokens from `first` on."""
        self._pack(head, first, count)
        self._decay()
        self._mix()

    def _pack(self, head: Value, first: Value, count: Value) -> None:
        """Rows of tokens, and keys and queries times their decays since the chunk began."""
        e, b, form, heads, parts = self.e, self.e.b, self.form, self.heads, self.parts
        lanes, pitch, chunk = form.lanes, form.pitch, form.chunk
        scale = e.splat(e.arg["scale"], lanes)
        zeros, ones = e.zeros(F32, lanes), fsplat(1.0, lanes)
        with e.for_range(0, pitch, lanes) as index:
            e.store(ones, parts["whole"], index)
        with e.for_range(0, pitch * chunk, lanes) as index:
            e.store(zeros, parts["ends"], index)
        with e.for_range(0, chunk) as row:
            is_there = b.icmp_signed("<", row, count)
            token = b.add(first, e.minimum(row, b.sub(count, const(1))))
            q, k = heads.row("q", token, head), heads.row("k", token, head)
            decays, base = heads.decays(token, head), b.mul(row, const(pitch))

            def strip(index: Value, size: int, way: int) -> None:
                at = b.add(base, index)
                key = b.select(is_there, load_f32(e, "f32", k, index, size), zeros)
                query = b.select(is_there, load_f32(e, "f32", q, index, size), zeros)
                query = b.fmul(query, scale)
                decay = b.select(is_there, decays(index, size), ones)
                whole = b.fmul(e.load_vec(parts["whole"], index, F32, lanes), decay)
                for name, value in (("k", key), ("q", query), ("decay", decay)):
                    e.store(value, parts[name], at)
                e.store(whole, parts["whole"], index)
                e.store(b.fmul(key, whole), parts["left"], at)
                e.store(b.fmul(query, whole), parts["left"], b.add(at, const(chunk * pitch)))

            for_strips(e, heads.keys, lanes, strip)
            if heads.delta:
                beta = b.select(is_there, heads.beta(token, head), F32(0.0))
                e.store(beta, parts["beta"], row)

    def _decay(self) -> None:
        """`ends` and `pairs`: some tokens at once, one row of keys after the other."""
        e, b, form, parts = self.e, self.e.b, self.form, self.parts
        chunk, pitch = form.chunk, form.pitch
        kind = vec(F32, chunk)
        some = max(1, e.tier.registers * e.lanes // (8 * chunk))
        lanes = lanes_mask(range(chunk))
        with e.for_range(0, chunk, some) as first:
            rows = [b.add(first, const(at)) for at in range(some)]
            turns = [b.icmp_signed("==", lanes, e.splat(b.trunc(row, I32), chunk)) for row in rows]
            sums = [[e.local(kind, e.zeros(F32, chunk)) for _ in range(2)] for _ in rows]
            base = b.mul(first, const(pitch))
            with e.for_range(0, self.heads.keys) as key:
                place = b.mul(key, const(chunk))
                kept = e.load_vec(parts["ends"], place, F32, chunk)
                for at, (turn, pair) in enumerate(zip(turns, sums, strict=True)):
                    index = b.add(b.add(base, key), const(at * pitch))
                    mine, query, decay = (
                        e.splat(e.load(parts[name], index, F32), chunk)
                        for name in ("k", "q", "decay")
                    )
                    kept = b.select(turn, mine, b.fmul(kept, decay))
                    for factor, slot in zip((mine, query), pair, strict=True):
                        b.store(e.fma(factor, kept, b.load(slot)), slot)
                e.store(kept, parts["ends"], place)
            for row, pair in zip(rows, sums, strict=True):
                for half, slot in enumerate(pair):
                    at = b.mul(b.add(row, const(half * chunk)), const(chunk))
                    e.store(b.load(slot), parts["pairs"], at)

    def _mix(self) -> None:
        """M and P M; without the delta rule P alone."""
        e, b, parts, chunk = self.e, self.e.b, self.parts, self.form.chunk
        kind = vec(F32, chunk)
        square = const(chunk * chunk)
        if not self.heads.delta:
            with e.for_range(0, chunk) as row:
                at = b.add(b.mul(row, const(chunk)), square)
                e.store(e.load_vec(parts["pairs"], at, F32, chunk), parts["mix"], at)
            return
        lanes, ones = lanes_mask(range(chunk)), fsplat(1.0, chunk)

        def line(total: Value, pairs: Value, behind: Value) -> None:
            with e.for_range(0, behind) as column:
                factor = e.splat(e.load(parts["pairs"], b.add(pairs, column), F32), chunk)
                mixed = e.load_vec(parts["mix"], b.mul(column, const(chunk)), F32, chunk)
                b.store(e.fma(factor, mixed, b.load(total)), total)

        with e.for_range(0, chunk) as row:
            at = b.mul(row, const(chunk))
            total = e.local(kind)
            b.store(e.zeros(F32, chunk), total)
            line(total, at, row)
            own = b.icmp_signed("==", lanes, e.splat(b.trunc(row, I32), chunk))
            own = b.select(own, ones, e.zeros(F32, chunk))
            beta = e.splat(e.load(parts["beta"], row, F32), chunk)
            e.store(b.fmul(b.fsub(own, b.load(total)), beta), parts["mix"], at)
            b.store(e.zeros(F32, chunk), total)
            line(total, b.add(at, square), b.add(row, const(1)))
            e.store(b.load(total), parts["mix"], b.add(at, square))
