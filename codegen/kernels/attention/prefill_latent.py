"""Keys and values of latent prefill attention: tiles of one head lifted from the cached latents.

The head's rows of kv_b times the latents of a tile of positions, by the panels of the many-token
matmul (codegen/panel/panel.py), straight from stored rows in every format. In the dot form keys and
values are rounded once to bf16; beside every key lies the rotated part that all heads share, as the
cache holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.codegen.ir import F32, I16, Emitter, Value, const
from hmc.codegen.kernels.attention.attend_rows import Pages
from hmc.codegen.kernels.attention.attend_scores import round_bf16
from hmc.codegen.kernels.attention.prefill_form import Form, lift_form
from hmc.codegen.kernels.attention.prefill_rows import Unit
from hmc.codegen.kernels.attention.prefill_tiles import bf16_pair
from hmc.codegen.panel.panel import Panels
from hmc.codegen.vector import for_strips, load_part, store_part


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
            return self._cache_row(b.add(start, index))

        panels.pack(latent, count)
        with e.for_range(0, count) as index:
            self._pack_rotated(latent(index), unit.part("keys", index, form.key_words))
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

    def _cache_row(self, position: Value) -> Value:
        """Address of a position's latent, behind which its rotated part lies."""
        e, b = self.e, self.e.b
        row = self._pages.row(position, const(0))
        return e.offset(e.arg["cache"], b.mul(row, const(2 * (self._rank + self._rope))))

    def _pack_rotated(self, latent: Value, key: Value) -> None:
        """The rotated part to the end of a packed key."""
        e, b, form = self.e, self.e.b, self.form
        source = e.offset(latent, const(2 * self._rank))

        def copy(index: Value, count: int, way: int) -> None:
            part = load_part(e, source, index, I16, count, form.step * form.lanes)
            part = part if form.dot else e.bf16_to_f32(part)
            store_part(e, part, key, b.add(index, const(self._nope)), count)

        for_strips(e, self._rope, form.step * form.lanes, copy)

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
