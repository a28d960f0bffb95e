"""Which tiles of keys the tokens of a unit of prefill attention chose: a tile is of one block, and
tiles come in order, as do the numbers of blocks that a token chose, so that each token has a place
in its own which moves on.
"""

from __future__ import annotations

from hmc.codegen.ir import I32, I64, Emitter, Value, const
from hmc.codegen.kernels.attention.prefill_form import Form
from hmc.codegen.kernels.attention.prefill_rows import Unit
from hmc.codegen.kernels.attention.prefill_tiles import LAST


class Choice:
    """What the tokens of a unit see of a tile. In scratch: of each token its place among what it
    chose, and the last position of the tile's block that it sees, or -1.
    """

    def __init__(self, e: Emitter, form: Form, unit: Unit) -> None:
        self.e, self.form, self.unit = e, form, unit
        self._places, self._lasts = (
            unit.part("choice", const(part), form.tokens) for part in range(2)
        )
        with e.for_range(0, unit.count) as token:
            e.store_int(const(0), self._places, token, align=4)

    def enter(self, start: Value) -> Value:
        """Code for the tile from position `start` on; whether (i1) some token sees any of it."""
        e, b, unit = self.e, self.e.b, self.unit
        block = b.udiv(start, const(e.spec["index_block"]))
        some = e.local(I64, const(0))
        with e.for_range(0, unit.count) as token:
            place = e.load_int(self._places, token, align=4)
            passed = b.icmp_signed("<", self._number(token, place), block)
            passed = b.and_(passed, b.icmp_signed(">=", self._number(token, place), const(0)))
            passed = b.and_(passed, b.icmp_signed("<", place, const(e.spec["index_topk"] - 1)))
            place = b.add(place, b.zext(passed, I64))
            e.store_int(place, self._places, token, align=4)
            sees = b.icmp_signed("==", self._number(token, place), block)
            position = b.add(b.sub(unit.end, unit.count), token)
            e.store_int(b.select(sees, position, const(-1)), self._lasts, token, align=4)
            b.store(b.or_(b.load(some), b.zext(sees, I64)), some)
        return b.icmp_signed("!=", b.load(some), const(0))

    def _number(self, token: Value, place: Value) -> Value:
        """Number of the block at a place among what a token chose."""
        e, b, spec = self.e, self.e.b, self.e.spec
        head = b.udiv(self.unit.kv_head, const(spec["kv_heads"] // spec["index_heads"]))
        token = b.add(self.unit.first, token)
        return e.load_int(e.row("chosen", token, head, spec["index_topk"], I32), place)

    def of_panel(self, panel: Value) -> tuple[Value, Value]:
        """Whether (i1) some rows of a panel see any of the tile, and whether all do."""
        e, b = self.e, self.e.b
        some, every = e.local(I64, const(0)), e.local(I64, const(1))
        first, last = self._token(panel, const(0)), self._token(panel, const(self.form.panel - 1))
        with e.for_range(first, b.add(last, const(1))) as token:
            sees = b.icmp_signed(">=", e.load_int(self._lasts, token, align=4), const(0))
            b.store(b.or_(b.load(some), b.zext(sees, I64)), some)
            b.store(b.and_(b.load(every), b.zext(sees, I64)), every)
        one, all_ = (b.icmp_signed("!=", b.load(slot), const(0)) for slot in (some, every))
        return one, all_

    def mark(self, panel: Value) -> None:
        """Tell the panel's rows up to which position they see the tile."""
        e, b, form = self.e, self.e.b, self.form
        state = self.unit.part("states", panel, form.state_words)
        with e.for_range(0, form.panel) as lane:
            last = e.load_int(self._lasts, self._token(panel, lane), align=4)
            e.store_int(last, state, b.add(const(LAST * form.panel), lane), align=4)

    def _token(self, panel: Value, lane: Value) -> Value:
        """Token of the unit that a row of a panel is of."""
        b, form = self.e.b, self.form
        row = b.add(b.mul(panel, const(form.panel)), lane)
        row = self.e.minimum(row, b.sub(self.unit.rows, const(1)))
        return b.udiv(row, const(form.group))
