"""Keys and values of prefill attention: tiles packed from the paged cache, or lifted from cached
latents, one head at a time.

Lifted: the head's rows of kv_b times the latents of a tile of positions, by the panels of the
many-token matmul (codegen/panel/panel.py), straight from stored rows in every format. In the dot
form keys and values are rounded once to bf16; beside every key lies the rotated part that all heads
share, as the cache holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.codegen.ir import F32, I16, I32, Emitter, Value, const, vec
from hmc.codegen.kernels.attention.attend_rows import Pages
from hmc.codegen.kernels.attention.attend_scores import round_bf16
from hmc.codegen.kernels.attention.prefill_form import Form, lift_form
from hmc.codegen.kernels.attention.prefill_rows import Unit
from hmc.codegen.kernels.attention.prefill_tiles import bf16_pair
from hmc.codegen.panel.panel import Panels
from hmc.codegen.vector import for_strips, isplat, load_part, store_part


class CachedKeys:
    """Packs keys and values as they lie in k_cache and v_cache."""

    def __init__(self, e: Emitter, form: Form) -> None:
        self.e, self.form = e, form
        self._pages = Pages(e, const(0), form.block, form.kv_heads)

    def pack(self, unit: Unit, start: Value) -> None:
        """Keys and values of the positions from `start` on that the unit sees, up to a tile.

        keys[position][key step]; values[position][dimension], in the dot form pairs of positions,
        0 for a second one that the unit does not see. Of pairs before the first position that it
        sees values are 0 and keys anything, since scores hide them.
        """
        e, b, form = self.e, self.e.b, self.form
        stop, first = e.minimum(unit.end, b.add(start, const(form.keys))), start
        if form.bounded:
            first = b.and_(unit.begin, const(-2))
            first = b.select(b.icmp_signed(">", first, start), first, start)
            words = b.mul(b.udiv(b.sub(first, start), const(form.step)), const(form.value))
            with e.for_range(0, words) as index:
                e.store(I32(0), unit.part("values", const(0), 0), index, align=4)
        with e.for_range(first, stop) as position:
            row = self._pages.row(position, unit.kv_head)
            source = e.at(e.arg["k_cache"], b.mul(row, const(form.key)), I16)
            key = unit.part("keys", b.sub(position, start), form.key_words)
            copy_key(e, form, source, form.key, key, 0, ways=2)
        with e.for_range(first, stop, form.step) as position:
            self._pack_values(unit, start, position, stop)

    def _pack_values(self, unit: Unit, start: Value, position: Value, stop: Value) -> None:
        """One position, or a pair of them."""
        e, b, form = self.e, self.e.b, self.form
        lanes = form.lanes
        pair = [self._pages.row(position, unit.kv_head)]
        if form.dot:
            second = b.add(position, const(1))
            is_seen = b.icmp_signed("<", second, stop)
            second = b.select(is_seen, second, position)
            pair.append(self._pages.row(second, unit.kv_head))
            high = e.splat(b.select(is_seen, I32(0xFFFF0000), I32(0)), lanes)
        rows = [e.at(e.arg["v_cache"], b.mul(row, const(form.value)), I16) for row in pair]
        at = b.udiv(b.sub(position, start), const(form.step))
        into = b.bitcast(unit.part("values", at, form.value), form.word.as_pointer())

        def mix(index: Value, count: int, way: int) -> None:
            parts = [load_part(e, row, index, I16, count, lanes) for row in rows]
            if form.dot:
                low, top = (b.zext(part, vec(I32, lanes)) for part in parts)
                top = b.and_(b.shl(top, isplat(16, lanes)), high)
                store_part(e, b.or_(low, top), into, index, count)
            else:
                store_part(e, e.bf16_to_f32(parts[0]), into, index, count)

        for_strips(e, form.value, lanes, mix, 2)


@dataclass(frozen=True)
class _Rows:
    """`count` rows of a head from `row` on, one vector: columns of its keys or of its values."""

    row: int
    column: int
    count: int
    of_values: bool


class LatentKeys:
    """Packs keys and values of one head; its scratch is the panels' own."""

    def __init__(self, e: Emitter, form: Form) -> None:
        spec = e.spec
        self.e, self.form, self._pages = e, form, Pages(e, const(0), spec["block"], 1)
        self._nope, self._rope, self._rank = spec["nope"], spec["rope"], spec["rank"]
        self._panels = Panels(e, lift_form(spec))

    def pack(self, unit: Unit, start: Value) -> None:
        """As `CachedKeys.pack`."""
        e, b, form = self.e, self.e.b, self.form
        panels = self._panels
        count = e.minimum(b.sub(unit.end, start), const(form.keys))

        def latent(index: Value) -> Value:
            """Address of a position's latent, behind which its rotated part lies."""
            row = self._pages.row(b.add(start, index), const(0))
            return e.offset(e.arg["cache"], b.mul(row, const(2 * (self._rank + self._rope))))

        panels.pack(latent, count, [e.arg["w_scale"]])
        if self._rope:
            with e.for_range(0, count) as index:
                rotated = e.offset(latent(index), const(2 * self._rank))
                key = unit.part("keys", index, form.key_words)
                copy_key(e, form, rotated, self._rope, key, self._nope)
        head = b.mul(unit.kv_head, const(self._nope + form.value))
        rows = const(form.heads * (self._nope + form.value))
        pairs = self._pairs()
        for number, pair in enumerate(pairs):
            here, ahead = (
                [
                    panels.rows(e.arg["w"], e.arg["w_scale"], b.add(head, const(part.row)), rows)
                    for part in pairs[turn % len(pairs)]
                ]
                for turn in (number, number + 1)
            )
            fetch = ahead[0].weights, ahead[-1].weights
            panels.multiply((here[0], here[-1]), count, fetch)
            for vector, part in enumerate(pair):
                store = self._store_values if part.of_values else self._store_keys
                store(unit, part, vector, count)

    def _pairs(self) -> list[list[_Rows]]:
        """All rows of a head as vectors, two (the last perhaps one) at a time."""
        lanes, nope, value = self.form.lanes, self._nope, self.form.value
        vectors = [_Rows(at, at, min(lanes, nope - at), False) for at in range(0, nope, lanes)]
        vectors += [
            _Rows(nope + at, at, min(lanes, value - at), True) for at in range(0, value, lanes)
        ]
        return [vectors[at : at + 2] for at in range(0, len(vectors), 2)]

    def _store_keys(self, unit: Unit, part: _Rows, vector: int, count: Value) -> None:
        """keys[position][column ...] of one vector of rows."""
        e, form = self.e, self.form
        with e.for_range(0, count) as index:
            value = self._panels.total(index, vector)
            value = round_bf16(e, value) if form.dot else value
            key = unit.part("keys", index, form.key_words)
            store_part(e, value, key, const(part.column), part.count)

    def _store_values(self, unit: Unit, part: _Rows, vector: int, count: Value) -> None:
        """values[position or pair][column ...] of one vector of rows."""
        e, b, form = self.e, self.e.b, self.form
        with e.for_range(0, count, form.step) as index:
            value = self._panels.total(index, vector)
            if form.dot:
                second = b.add(index, const(1))
                is_seen = b.icmp_signed("<", second, count)
                other = self._panels.total(b.select(is_seen, second, index), vector)
                other = b.select(is_seen, other, e.zeros(F32, form.lanes))
                value = bf16_pair(e, value, other)
            line = unit.part("values", b.udiv(index, const(form.step)), form.value)
            store_part(e, value, line, const(part.column), part.count)


def copy_key(
    e: Emitter, form: Form, source: Value, width: int, key: Value, column: int, ways: int = 1
) -> None:
    """`width` elements of a cache row to a packed key, from element `column` on."""
    size = form.step * form.lanes

    def strip(index: Value, count: int, way: int) -> None:
        part = load_part(e, source, index, I16, count, size)
        part = part if form.dot else e.bf16_to_f32(part)
        store_part(e, part, key, e.b.add(index, const(column)), count)

    for_strips(e, width, size, strip, ways)
