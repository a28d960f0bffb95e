"""Keys and values of grouped-query prefill attention: tiles packed from the paged cache."""

from __future__ import annotations

from hmc.codegen.ir import I16, I32, Emitter, Value, const, vec
from hmc.codegen.kernels.attention.attend_rows import Pages
from hmc.codegen.kernels.attention.prefill_form import Form
from hmc.codegen.kernels.attention.prefill_rows import Unit
from hmc.codegen.vector import for_strips, isplat, load_part, store_part


class CachedKeys:
    """Packs keys and values as they lie in k_cache and v_cache."""

    def __init__(self, e: Emitter, form: Form) -> None:
        self.e, self.form = e, form
        self._pages = Pages(e, const(0), form.block, form.kv_heads)

    def pack(self, unit: Unit, start: Value) -> None:
        """Keys and values of the positions from `start` on that the unit sees, up to a tile.

        keys[position][key step]; values[position][dimension], in the dot form pairs of positions,
        0 for a second one that the unit does not see.
        """
        e, b, form = self.e, self.e.b, self.form
        stop = e.minimum(unit.end, b.add(start, const(form.keys)))
        with e.for_range(start, stop) as position:
            self._pack_key(unit, start, position)
        with e.for_range(start, stop, form.step) as position:
            self._pack_values(unit, start, position, stop)

    def _pack_key(self, unit: Unit, start: Value, position: Value) -> None:
        e, b, form = self.e, self.e.b, self.form
        lanes = form.lanes
        row = self._pages.row(position, unit.kv_head)
        source = e.at(e.arg["k_cache"], b.mul(row, const(form.key)), I16)
        target = unit.part("keys", b.sub(position, start), form.key_words)

        def copy(index: Value, count: int, way: int) -> None:
            if form.dot:
                part = load_part(e, source, index, I16, count, 2 * lanes)
                store_part(e, part, target, index, count)
            else:
                part = load_part(e, source, index, I16, count, lanes)
                store_part(e, e.bf16_to_f32(part), target, index, count)

        for_strips(e, form.key, form.step * lanes, copy, 2)

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
