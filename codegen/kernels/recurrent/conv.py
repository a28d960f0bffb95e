"""`conv`: causal convolution of each column with a few taps of its own, and what an expression
makes of it.

The inputs that taps reach back to are in registers while tokens have the same slot; so many columns
are done at once as have registers for them, and what is read next is fetched ahead, since rows lie
far apart.
"""

from __future__ import annotations

from hmc.codegen import functions
from hmc.codegen.expr import parse
from hmc.codegen.ir import F32, Emitter, Value, const
from hmc.codegen.kernels.recurrent.columns import for_columns, in_order
from hmc.codegen.vector import load_f32, store_f32

_AHEAD = 8
"""Tokens ahead whose inputs are fetched."""
_MOST = 4
"""Vectors of columns that are done at once at most."""


def _block(e: Emitter) -> int:
    """Vectors of columns at once: each has taps - 1 inputs in registers, of which half are left to
    everything else.
    """
    return max(1, min(_MOST, e.tier.registers // 2 // (e.spec["taps"] - 1)))


class _Part:
    """A vector of columns, of which `count` are there, for a kernel under construction."""

    def __init__(self, e: Emitter, column: Value, count: int) -> None:
        self._e, self._column, self._count = e, column, count
        self._taps = [
            self._load("weight", const(tap * e.spec["width"])) for tap in range(e.spec["taps"])
        ]
        self._bias = self._load("bias", const(0)) if e.spec.get("biased") else None
        zero = e.zeros(F32, e.lanes)
        self._past = [e.local(zero.type) for _ in self._taps[1:]]
        """The last inputs, oldest first."""

    def load(self, state: Value) -> None:
        """Take the past from row `state` (in elements) of the states."""
        for number, slot in enumerate(self._past):
            self._e.b.store(self._load("state", self._row(state, number)), slot)

    def store(self, state: Value) -> None:
        """Put it back."""
        for number, slot in enumerate(self._past):
            self._put(self._e.b.load(slot), "state", self._row(state, number))

    def step(self, token: Value) -> None:
        """The next token."""
        e, b = self._e, self._e.b
        x = self._load("x", b.mul(token, e.arg["x_stride"]))
        inputs = [*(b.load(slot) for slot in self._past), x]
        for slot, value in zip(self._past, inputs[1:], strict=True):
            b.store(value, slot)
        first = b.fmul(inputs[0], self._taps[0])
        y = first if self._bias is None else e.fma(inputs[0], self._taps[0], self._bias)
        for value, tap in zip(inputs[1:], self._taps[1:], strict=True):
            y = e.fma(value, tap, y)
        y = functions.emit(e, parse(e.spec.expr), {"x": y}.__getitem__, e.lanes)
        self._put(y, "y", b.mul(token, e.arg["y_stride"]))

    def _row(self, state: Value, number: int) -> Value:
        return self._e.b.add(state, const(number * self._e.spec["width"]))

    def _load(self, name: str, row: Value) -> Value:
        index = self._e.b.add(row, self._column)
        return load_f32(self._e, "f32", self._e.arg[name], index, self._count)

    def _put(self, value: Value, name: str, row: Value) -> None:
        index = self._e.b.add(row, self._column)
        store_f32(self._e, "f32", value, self._e.arg[name], index, self._count)


def emit_conv(e: Emitter) -> None:
    """IR of `conv`; params width, taps, biased (unset: 0); expr of x."""
    b, width = e.b, e.spec["width"]
    size = const((e.spec["taps"] - 1) * width)

    def block(column: Value, count: int) -> None:
        starts = range(0, count, e.lanes)
        parts = [_Part(e, b.add(column, const(at)), min(e.lanes, count - at)) for at in starts]

        def load(slot: Value) -> None:
            for part in parts:
                part.load(b.mul(slot, size))

        def store(slot: Value) -> None:
            for part in parts:
                part.store(b.mul(slot, size))

        with in_order(e, load, store) as token:
            ahead = e.row("x", e.minimum(b.add(token, const(_AHEAD)), e.arg["tokens"]))
            for at, part in zip(starts, parts, strict=True):
                e.prefetch(e.at(ahead, b.add(column, const(at)), F32), 3)
                part.step(token)

    for_columns(e, width, e.lanes * _block(e), block)
