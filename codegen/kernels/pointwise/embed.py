"""Rows picked out of a table: the embedding of token ids, and the rows whose logits are wanted."""

from __future__ import annotations

from hmc.codegen import vector
from hmc.codegen.ir import Emitter, Value, const


def _copy_rows(e: Emitter, table: str, stride: Value, format_name: str, picks: str) -> None:
    """y[i, :] = table[picks[i], :] as f32, split by row."""
    b = e.b
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as row:
        pick = e.load_int(e.arg[picks], row)
        source = vector.place(e, format_name, e.arg[table], b.mul(pick, stride))
        vector.copy_row(e, format_name, source, "f32", e.row("y", row), e.spec["width"], 4)


def emit_embed(e: Emitter) -> None:
    """`embed`: table in `spec.weight` (bf16, fp16 or f32), rows of exactly `width`."""
    _copy_rows(e, "table", const(e.spec["width"]), e.spec.weight, "ids")


def emit_gather_rows(e: Emitter) -> None:
    """`gather_rows`: f32 rows."""
    _copy_rows(e, "x", e.arg["x_stride"], "f32", "rows")
