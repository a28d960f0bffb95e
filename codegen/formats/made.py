"""Weights of any format as f32 by a decoder that is made from its planes: what a format has on its
first day, on every tier.

Codes become what they are worth (values.py); blocks have routines of their own (blocks.py). Zeros
are taken off and scales multiplied in here, one rounding each as in `formats/decode.py`, so what
multiplies knows nothing of them. Routines of their own, since they are long.
"""

from __future__ import annotations

from hmc.codegen.formats.blocks import block_weights
from hmc.codegen.formats.planes import Row, planes_of, spread
from hmc.codegen.formats.values import codes_f32
from hmc.codegen.ir import F32, I8, I64, Emitter, Value, vec
from hmc.codegen.spec import KernelSpec
from hmc.formats import format_of

_PTR = I8.as_pointer()


def made_f32(e: Emitter, spec: KernelSpec, row: Row, k: Value, count: int) -> Value:
    """`count` (at most the tier's lanes, of which `k` (i64) is a multiple) weights of `row` from
    `k` on, with their scales; zeros behind them, and nothing past them is read.
    """
    kind, name = vec(F32, e.lanes), f"made_{min(count, e.lanes)}"
    if name not in e.module.globals:
        kinds = [_PTR] * (1 + len(row.planes))
        with e.subroutine(name, *kinds, I64, kind.as_pointer()) as (codes, *beside, at, out):
            found = _decoded(e, spec, Row(codes, tuple(beside)), at, min(count, e.lanes))
            e.b.store(found, out)
    out = e.local(kind)
    e.b.call(e.module.globals[name], [row.codes, *row.planes, k, out])
    return e.b.load(out)


def _decoded(e: Emitter, spec: KernelSpec, row: Row, k: Value, count: int) -> Value:
    known = format_of(spec.weight)
    if known.codes.block[1]:
        return block_weights(e, known, row.codes, k)
    total = codes_f32(e, known, row.codes, k, count)
    for kind, combine in (("zero", e.b.fsub), ("scale", e.b.fmul)):
        for plane, base in zip(planes_of(spec), row.planes, strict=True):
            if plane.kind == kind:
                total = combine(total, spread(e, plane, base, k, count))
    return total
