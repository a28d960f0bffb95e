"""Rows picked out of a table: the embedding of token ids, and the rows whose logits are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hmc.codegen.formats.planes import Row
from hmc.codegen.formats.weights import row_bytes, weights_f32
from hmc.codegen.ir import Emitter, Value, const
from hmc.codegen.vector import copy_row, for_strips, store_f32

_WAYS = 4
"""Strips of a row in one round of its loop."""


@contextmanager
def _picked(e: Emitter, table: str, stride: Value, picks: str) -> Iterator[tuple[Value, Value]]:
    """Of every token, split by token: addresses of its row of `table` and of `y`."""
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        pick = e.load_int(e.arg[picks], token)
        yield e.offset(e.arg[table], e.b.mul(pick, stride)), e.row("y", token)


def emit_embed(e: Emitter) -> None:
    """`embed`: a table in any format of one plane, rows of exactly `width`, to f32."""
    width = e.spec["width"]
    stride = const(row_bytes(e.spec.weight, width))
    with _picked(e, "table", stride, "ids") as (source, target):

        def strip(index: Value, count: int, way: int) -> None:
            (found,) = weights_f32(e, e.spec, Row(source, ()), index, count)
            store_f32(e, "f32", found, target, index, count)

        for_strips(e, width, e.lanes, strip, _WAYS)


def emit_gather_rows(e: Emitter) -> None:
    """`gather_rows`: f32 rows."""
    stride = e.b.mul(e.arg["x_stride"], const(4))
    with _picked(e, "x", stride, "rows") as (source, target):
        copy_row(e, "f32", source, "f32", target, e.spec["width"], _WAYS)
