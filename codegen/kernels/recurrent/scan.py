"""`selective_scan`: the scan of Mamba, a vector of columns at a time.

States lie element after element of all columns, so nothing is summed across lanes and nothing is
turned. Those of the columns under way, and the rates of their decay, are on the stack while tokens
have the same slot: in the slot they lie so far apart that the first-level cache has no room.
"""

from __future__ import annotations

from hmc.codegen.ir import F32, Emitter, Value, const
from hmc.codegen.kernels.recurrent.columns import for_columns, in_order
from hmc.codegen.vector import exp, load_f32, store_f32

_AHEAD = 4
"""Tokens ahead whose inputs are fetched."""


class _Columns:
    """A vector of columns, of which `count` are there, for a kernel under construction."""

    def __init__(self, e: Emitter, column: Value, count: int, rates: Value, held: Value) -> None:
        self._e, self._column, self._count = e, column, count
        self._rates, self._held = rates, held
        self._copy("rate", const(0), rates)

    def load(self, slot: Value) -> None:
        """Take the states of a slot."""
        self._copy("state", self._first(slot), self._held)

    def store(self, slot: Value) -> None:
        """Put them back."""
        e, b = self._e, self._e.b
        with e.for_range(0, const(e.spec["states"])) as n:
            place = b.add(self._first(slot), b.mul(n, const(e.spec["width"])))
            value = b.load(b.gep(self._held, [n]))
            store_f32(e, "f32", value, e.arg["state"], b.add(place, self._column), self._count)

    def step(self, token: Value) -> None:
        """The next token."""
        e, b = self._e, self._e.b
        x, dt = (self._input(name, token) for name in ("x", "dt"))
        grown, total = b.fmul(dt, x), e.local(x.type, e.zeros(F32, e.lanes))
        rows = {name: e.row(name, token) for name in ("b", "c")}
        with e.for_range(0, const(e.spec["states"])) as n:
            into, out = (e.splat(b.load(b.gep(rows[name], [n])), e.lanes) for name in ("b", "c"))
            decay = exp(e, b.fmul(dt, b.load(b.gep(self._rates, [n]))))
            place = b.gep(self._held, [n])
            state = e.fma(decay, b.load(place), b.fmul(grown, into))
            b.store(state, place)
            b.store(e.fma(state, out, b.load(total)), total)
        index = b.add(b.mul(token, e.arg["y_stride"]), self._column)
        store_f32(e, "f32", b.load(total), e.arg["y"], index, self._count)

    def _input(self, name: str, token: Value) -> Value:
        e, b = self._e, self._e.b
        ahead = e.minimum(b.add(token, const(_AHEAD)), e.arg["tokens"])
        e.prefetch(e.at(e.row(name, ahead), self._column, F32), 3)
        index = b.add(b.mul(token, e.arg[f"{name}_stride"]), self._column)
        return load_f32(e, "f32", e.arg[name], index, self._count)

    def _first(self, slot: Value) -> Value:
        return self._e.b.mul(slot, const(self._e.spec["states"] * self._e.spec["width"]))

    def _copy(self, name: str, first: Value, target: Value) -> None:
        """Elements of the columns from a matrix [states, width] to the stack."""
        e, b = self._e, self._e.b
        with e.for_range(0, const(e.spec["states"])) as n:
            index = b.add(b.add(first, b.mul(n, const(e.spec["width"]))), self._column)
            value = load_f32(e, "f32", e.arg[name], index, self._count)
            b.store(value, b.gep(target, [n]))


def emit_selective_scan(e: Emitter) -> None:
    """IR of `selective_scan`; params width, states."""
    kind = e.zeros(F32, e.lanes).type
    rates, held = (e.buffer(kind, e.spec["states"]) for _ in range(2))

    def block(column: Value, count: int) -> None:
        columns = _Columns(e, column, count, rates, held)
        with in_order(e, columns.load, columns.store) as token:
            columns.step(token)

    for_columns(e, e.spec["width"], e.lanes, block)
