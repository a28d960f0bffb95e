"""`pointwise`: an expression over rows (rowwise.py), element by element, with sums over rows or
over groups of a row's columns.

Workers share (token, group), and pieces of long rows where nothing is summed. Sums are collected in
four vectors, in an order that does not depend on workers.
"""

from __future__ import annotations

from llvmlite import ir

from hmc.codegen import functions, vector
from hmc.codegen.expr import REDUCTIONS, Expr
from hmc.codegen.ir import F32, I1, Emitter, Value, const, fconst, vec
from hmc.codegen.kernels.pointwise.norm import WAYS, Sum
from hmc.codegen.rowwise import BF16_INPUTS, BY_GROUP, VECTORS, Rowwise

_STRIPS = 32
"""Vectors of a row that one worker takes at least, where a row may be cut."""


class _Group:
    """The columns of one group of one token, for a kernel under construction."""

    def __init__(self, e: Emitter, form: Rowwise, token: Value, group: Value) -> None:
        self._e, self._form = e, form
        self._group, self._first = group, e.b.mul(group, const(form.size))
        self._known: dict[Expr, Value] = {}
        self._places = {name: self._place(name, token) for name, _ in form.columns}
        self._narrow = {
            name: self._one(name) for name, _ in form.columns if not form.wide_operand(name)
        }
        for node in dict.fromkeys(form.tree):
            if node.op in REDUCTIONS:
                self._known[node] = self._reduced(node)

    def value(self, tree: Expr, index: Value, count: int) -> Value:
        """`tree` at columns [index, index + count) of the group, padded to a whole vector."""

        def operand(name: str) -> Value:
            if name in self._narrow:
                return self._narrow[name]
            place = self._places[name]
            return vector.load_f32(self._e, _format(name), place, index, count)

        return functions.emit(self._e, tree, operand, self._e.lanes, self._known)

    def store(self, token: Value, index: Value, count: int) -> None:
        """Compute and store `count` columns from `index` on; the one of a narrow result."""
        e, b, tree = self._e, self._e.b, self._form.tree
        first = self._first if self._form.wide(tree) else self._group
        start = b.add(b.mul(token, e.arg["y_stride"]), first)
        y = vector.place(e, e.spec.out, e.arg["y"], start)
        vector.store_f32(e, e.spec.out, self.value(tree, index, count), y, index, count)

    def _place(self, name: str, token: Value) -> Value:
        """Where the group's part of an operand begins, i8*."""
        e, b, form = self._e, self._e.b, self._form
        if name in BY_GROUP:
            index = self._group
        elif name in VECTORS:
            index = self._first if dict(form.columns)[name] == form.width else const(0)
        else:
            line = b.mul(token, e.arg[f"{name}_stride"])
            index = b.add(line, self._first if form.wide_operand(name) else self._group)
        return vector.place(e, _format(name), e.arg[name], index)

    def _one(self, name: str) -> Value:
        """An operand's one value for the group, in every lane."""
        e, zero = self._e, const(0)
        value = e.load(self._places[name], zero, vector.ELEMENTS[_format(name)])
        if name in BF16_INPUTS:
            value = e.bf16_to_f32(value)
        return e.splat(value, e.lanes)

    def _reduced(self, node: Expr) -> Value:
        """A sum or mean over the group's columns, in every lane; of a value that is one a group it
        is that value.
        """
        e, b, (arg,) = self._e, self._e.b, node.args
        if not self._form.wide(arg):
            return self.value(arg, const(0), 1)
        sums = Sum(e)

        def strip(index: Value, count: int, way: int) -> None:
            value = self.value(arg, index, count)
            if count < e.lanes:  # what stands behind the row is not zero after arithmetic
                there = ir.Constant(vec(I1, e.lanes), [int(n < count) for n in range(e.lanes)])
                value = b.select(there, value, e.zeros(F32, e.lanes))
            sums.add(value, way)

        vector.for_strips(e, self._form.size, e.lanes, strip, WAYS)
        total = sums.total()
        if node.op == "mean":
            total = b.fdiv(total, fconst(float(self._form.size)))
        return e.splat(total, e.lanes)


def _format(name: str) -> str:
    return "bf16" if name in BF16_INPUTS else "f32"


def emit_pointwise(e: Emitter) -> None:
    """IR of `pointwise`; expr and params as rowwise.py says."""
    form = Rowwise.of(e.spec)
    b, lanes = e.b, e.lanes
    whole, rest = divmod(form.size, lanes) if form.wide(form.tree) else (0, 1)
    sums = any(node.op in REDUCTIONS for node in form.tree)
    pieces = 1 if sums else max(1, -(-whole // _STRIPS))
    start, stop = e.split(b.mul(e.arg["tokens"], const(form.groups * pieces)))
    with e.for_range(start, stop) as item:
        row, piece = b.sdiv(item, const(pieces)), b.srem(item, const(pieces))
        token, group = b.sdiv(row, const(form.groups)), b.srem(row, const(form.groups))
        columns = _Group(e, form, token, group)
        first, last = (
            b.mul(b.sdiv(b.mul(const(whole), each), const(pieces)), const(lanes))
            for each in (piece, b.add(piece, const(1)))
        )
        with e.for_range(first, last, lanes) as index:
            columns.store(token, index, lanes)
        if rest:
            with b.if_then(b.icmp_signed("==", piece, const(pieces - 1))):
                columns.store(token, const(whole * lanes), rest)
