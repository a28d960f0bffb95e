"""Dealing the units of prefill attention to workers, and taking one through its keys.

Units are dealt largest first, back and forth over the workers, which balances causal cost. Key
tiles start at multiples of their size counted from position 0 and what a query must not see changes
nothing, so a result depends on its query and the cache alone: never on chunk, block or workers.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from hmc.codegen.ir import I32, Emitter, Value, const
from hmc.codegen.kernels.attention.prefill_form import Form
from hmc.codegen.kernels.attention.prefill_rows import Unit
from hmc.codegen.kernels.attention.prefill_tiles import Tiles
from hmc.codegen.ragged import ceil_div

Pack = Callable[[Unit, Value], None]
"""Fills the scratch of a unit with the keys and values it sees, from a position on."""

Choice = Callable[[Value, Value], Value]
"""How many blocks the tokens are divided into, of the least and the most there can be."""


def attend_units(e: Emitter, form: Form, scratch: Value, pack_keys: Pack, choose: Choice) -> None:
    """All units of this worker: blocks of tokens, as many as `choose(least, most)` says, by key
    heads.
    """
    b = e.b
    tiles = Tiles(e, form)
    past = e.load_int(e.arg["positions"], const(0))

    # Blocks of whole grains; a grain is as many tokens as fill panels without a rest.
    grain = form.panel // gcd(form.panel, form.group)
    grain = grain if grain <= form.tokens else 1
    grains = ceil_div(e, e.arg["tokens"], const(grain))
    blocks = choose(ceil_div(e, grains, const(form.tokens // grain)), grains)
    total = b.mul(blocks, const(form.kv_heads))
    with e.for_range(0, ceil_div(e, total, e.workers)) as turn:
        back = b.sub(b.sub(e.workers, const(1)), e.worker)
        is_odd = b.trunc(turn, I32)
        is_odd = b.icmp_signed("==", b.and_(is_odd, I32(1)), I32(1))
        number = b.add(b.mul(turn, e.workers), b.select(is_odd, back, e.worker))
        with b.if_then(b.icmp_signed("<", number, total)):
            # Later blocks see more keys: they come first.
            block = b.sub(b.sub(blocks, const(1)), b.udiv(number, const(form.kv_heads)))
            kv_head = b.urem(number, const(form.kv_heads))

            def border(index: Value) -> Value:
                token = b.mul(b.udiv(b.mul(grains, index), blocks), const(grain))
                return e.minimum(token, e.arg["tokens"])

            first = border(block)
            count = b.sub(border(b.add(block, const(1))), first)
            unit = Unit(e, form, scratch, past, first, count, kv_head)
            _attend(e, form, tiles, unit, pack_keys)


def _attend(e: Emitter, form: Form, tiles: Tiles, unit: Unit, pack_keys: Pack) -> None:
    """One unit: pack queries, go through all key tiles it sees, write its results."""
    b = e.b
    unit.pack_queries()
    with e.for_range(0, unit.end, form.keys) as start:
        pack_keys(unit, start)
        with e.for_range(0, unit.panels) as panel:
            end = b.add(unit.last_position(panel), const(1))
            count = e.minimum(b.sub(end, start), const(form.keys))
            with b.if_then(b.icmp_signed(">", count, const(0))):
                whole = b.sub(b.add(start, const(form.keys)), const(1))
                hidden = b.icmp_signed(">", whole, unit.first_position(panel))
                tiles.step(unit.scratch, panel, start, count, hidden)
    unit.write_results()
