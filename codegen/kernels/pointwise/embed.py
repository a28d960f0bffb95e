"""Rows picked out of a table: the embedding of token ids, and the rows whose logits are wanted."""

from __future__ import annotations

from hmc.codegen import vector
from hmc.codegen.ir import F32, I32, I64, Emitter, Value, const
from hmc.codegen.isa import TIERS
from hmc.codegen.spec import KernelSpec


def _copy_rows(e: Emitter, table: str, stride: Value, format_name: str, picks: str) -> str:
    """y[i, :] = table[picks[i], :] as f32, split by row."""
    b, lanes, width = e.b, TIERS[e.spec.isa].lanes, e.spec["width"]
    size = const(vector.width_of(format_name))
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as row:
        pick = b.sext(e.load(e.arg[picks], row, I32), I64)
        source = e.offset(e.arg[table], b.mul(b.mul(pick, stride), size))
        target = e.at(e.arg["y"], b.mul(row, e.arg["y_stride"]), F32)

        def strip(
            index: Value, count: int, way: int, source: Value = source, target: Value = target
        ) -> None:
            value = vector.load_f32(e, format_name, source, index, count, lanes)
            vector.store_f32(e, "f32", value, target, index, count)

        vector.for_strips(e, width, lanes, strip, 4)
    return e.finish()


def emit_embed(spec: KernelSpec) -> str:
    """`embed`: table in `spec.weight` (bf16, fp16 or f32), rows of exactly `width`."""
    return _copy_rows(Emitter(spec), "table", const(spec["width"]), spec.weight, "ids")


def emit_gather_rows(spec: KernelSpec) -> str:
    """`gather_rows`: f32 rows."""
    e = Emitter(spec)
    return _copy_rows(e, "x", e.arg["x_stride"], "f32", "rows")
