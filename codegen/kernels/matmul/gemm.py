"""`gemm`: many-token matmul for prefill, straight from checkpoint rows.

Workers share (token block, row panel) items in one order, so that a worker stays on a block, packs
it once, and reads its rows of weights while the block is in L2. Where there are few panels for the
workers, blocks get smaller.

Zen 4, one core, FP8, shares of the dot-product peak, against oneDNN through PyTorch on weights that
are bf16 already: ahead up to 64 tokens (32: 0.77-0.83 to 0.60-0.73); from 128 on 0.81-0.92 to
0.81-0.93, except 0.72 to 0.89 at K = 7168 and 512 tokens or more. PyTorch's own conversion to bf16
takes oneDNN to 0.06 at 32 tokens, 0.5 at 512 and 0.74 at 2048.
"""

from __future__ import annotations

from hmc.codegen.ir import F32, I16, I64, Emitter, Value, const, vec
from hmc.codegen.panel.panel import Panels, Rows
from hmc.codegen.panel.tiling import VECTORS, Form
from hmc.codegen.ragged import ceil_div, load_lanes, store_lanes

_ITEMS = 4
"""Least (block, panel) items of a worker, for balance."""


def emit_gemm(e: Emitter) -> None:
    """IR of `gemm`: params k (int4: group, scale_dtype); out f32 or bf16."""
    b = e.b
    form = Form.of(e.spec)
    panels = Panels(e, form)
    rows, tokens = e.arg["rows"], e.arg["tokens"]
    count = ceil_div(e, rows, const(form.rows))
    wanted = ceil_div(e, b.mul(e.workers, const(_ITEMS)), count)
    blocks = ceil_div(e, tokens, const(form.block))
    blocks = b.select(b.icmp_signed("<", blocks, wanted), wanted, blocks)
    blocks = e.minimum(blocks, tokens)
    start, stop = e.split(b.mul(blocks, count))
    element = I16 if e.spec.out == "bf16" else F32
    packed = e.local(I64, const(-1))
    with e.for_range(start, stop) as item:
        block, panel = b.udiv(item, count), b.urem(item, count)
        first = b.udiv(b.mul(tokens, block), blocks)
        end = b.udiv(b.mul(tokens, b.add(block, const(1))), blocks)
        here = b.sub(end, first)
        with b.if_then(b.icmp_signed("!=", b.load(packed), block)):
            b.store(block, packed)
            panels.pack(lambda token: _source(e, b.add(first, token)), here, [e.arg["scale"]])
        row = b.mul(panel, const(form.rows))
        parts = [_rows(e, panels, b.add(row, const(v * form.lanes))) for v in range(2 * VECTORS)]
        ahead = (parts[2].weights, parts[3].weights)
        with e.for_range(0, here) as token:
            # Lines of y, which a row stride apart no hardware prefetcher foresees.
            index = b.add(b.mul(b.add(first, token), e.arg["y_stride"]), row)
            for v in range(VECTORS):
                target = e.at(e.arg["y"], b.add(index, const(v * form.lanes)), element)
                e.prefetch(target, 2)
        panels.multiply((parts[0], parts[1]), here, ahead)
        _store(e, panels, row, first, here)


def _rows(e: Emitter, panels: Panels, row: Value) -> Rows:
    return panels.rows(e.arg["w"], e.arg["scale"], row, e.arg["rows"])


def _source(e: Emitter, token: Value) -> Value:
    """Address of the x row of `token`, through `gather` where there is one."""
    b = e.b
    gather = e.arg["gather"]
    row = e.local(I64)
    b.store(token, row)
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(gather, I64), const(0))):
        b.store(e.load_int(gather, token, align=4), row)
    return e.offset(e.arg["x"], b.mul(b.load(row), b.mul(e.arg["x_stride"], const(2))))


def _store(e: Emitter, panels: Panels, row: Value, first: Value, count: Value) -> None:
    """Totals (+ bias) of one panel to y."""
    b, lanes = e.b, panels.form.lanes
    bias = e.arg["bias"]
    slots = [e.local(vec(F32, lanes), e.zeros(F32, lanes)) for _ in range(VECTORS)]
    left = [b.sub(e.arg["rows"], b.add(row, const(v * lanes))) for v in range(VECTORS)]
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(bias, I64), const(0))):
        for v, slot in enumerate(slots):
            index = b.add(row, const(v * lanes))
            b.store(load_lanes(e, bias, index, lanes, left[v]), slot)
    with e.for_range(0, count) as token:
        line = b.mul(b.add(first, token), e.arg["y_stride"])
        for v, slot in enumerate(slots):
            total = b.fadd(panels.total(token, v), b.load(slot))
            if e.spec.out == "bf16":
                total = e.f32_to_bf16(total)
            index = b.add(line, b.add(row, const(v * lanes)))
            store_lanes(e, total, e.arg["y"], index, left[v])
