"""`attention_prefill`: causal attention of a chunk of one sequence over the paged cache.

Workers share units: a block of tokens, all heads of one cache row. Units are dealt largest first,
back and forth over the workers, which balances causal cost. A unit packs its queries once; then it
packs one tile of keys and values at a time and takes every panel of queries through it
(prefill_tiles.py). Key tiles start at multiples of their size counted from position 0 and what a
query must not see changes nothing, so a result depends on its query and the cache alone: never on
chunk, block or workers.

Zen 4, 32 heads of 128 over 4 cache rows, causal FLOPs, shares of the dot-product peak at 512 and
2048 tokens: 0.52 and 0.57 with queries in two terms, 0.72 and 0.80 in one. Two are the default: in
one, a parity test against transformers misses its count of large errors by one token. In two terms,
for 128 tokens after 1920, scores take 0.60 of the time (1.01 of what their dot products must take),
values 0.31 (1.04), softmax 0.04, packing 0.05. Tried and dropped, no difference beyond the noise of
3 %: register tiles of 3 vectors x 8, key tiles of 64 to 288, units of 384 to 1024 rows.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmc.codegen.ir import I32, I64, Emitter, Value, const
from hmc.codegen.kernels.attention import attention
from hmc.codegen.kernels.prefill_form import Form
from hmc.codegen.kernels.prefill_rows import Unit
from hmc.codegen.kernels.prefill_tiles import Tiles
from hmc.codegen.ragged import ceil_div
from hmc.codegen.spec import KernelSpec

Array = NDArray[Any]

_UNITS = 4
"""Least units of a worker, for balance, while tokens last."""


def prefill_attention_scratch_bytes(spec: KernelSpec) -> int:
    """Bytes of `scratch` for one worker; worker w uses the w-th such piece. Best aligned to 64."""
    return Form.of(spec).scratch_bytes


def emit_attention_prefill(spec: KernelSpec) -> str:
    """IR of `attention_prefill`: params heads, kv_heads, head_dim, v_dim, block."""
    e = Emitter(spec)
    b, form = e.b, Form.of(spec)
    tiles = Tiles(e, form)
    past = b.sext(e.load(e.arg["positions"], const(0), I32), I64)
    sequence = b.sext(e.load(e.arg["sequence"], const(0), I32), I64)
    table = e.at(e.arg["tables"], b.mul(sequence, e.arg["table_stride"]), I32)
    scratch = e.offset(e.arg["scratch"], b.mul(e.worker, const(form.scratch_bytes)))

    # Blocks of whole grains; a grain is as many tokens as fill panels without a rest.
    grain = form.panel // gcd(form.panel, form.group)
    grain = grain if grain <= form.tokens else 1
    grains = ceil_div(e, e.arg["tokens"], const(grain))
    blocks = ceil_div(e, grains, const(form.tokens // grain))
    wanted = ceil_div(e, b.mul(e.workers, const(_UNITS)), const(form.kv_heads))
    blocks = b.select(b.icmp_signed("<", blocks, wanted), wanted, blocks)
    blocks = e.minimum(blocks, grains)
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
            unit = Unit(e, form, scratch, table, past, first, count, kv_head)
            _attend(e, form, tiles, unit)
    return e.finish()


def _attend(e: Emitter, form: Form, tiles: Tiles, unit: Unit) -> None:
    """One unit: pack queries, go through all key tiles it sees, write its results."""
    b = e.b
    unit.pack_queries()
    with e.for_range(0, unit.end, form.keys) as start:
        unit.pack_keys(start)
        with e.for_range(0, unit.panels) as panel:
            end = b.add(unit.last_position(panel), const(1))
            count = e.minimum(b.sub(end, start), const(form.keys))
            with b.if_then(b.icmp_signed(">", count, const(0))):
                whole = b.sub(b.add(start, const(form.keys)), const(1))
                hidden = b.icmp_signed(">", whole, unit.first_position(panel))
                tiles.step(unit.scratch, panel, start, count, hidden)
    unit.write_results()


def attention_prefill(
    q: Array, k_cache: Array, v_cache: Array, table: Array, past: int, scale: float
) -> Array:
    """Reference in f64: q [tokens, heads, head_dim] at positions past, past + 1, ...; caches
    [blocks, kv_heads, block, dim]; table [n] the sequence's blocks. Result [tokens, heads, v_dim].
    """
    tokens = len(q)
    sequence, positions = np.zeros(tokens, np.int32), np.arange(past, past + tokens)
    return attention(q, k_cache, v_cache, table[None], sequence, positions, scale)


EMITTERS = {"attention_prefill": emit_attention_prefill}
REFERENCES = {"attention_prefill": attention_prefill}
