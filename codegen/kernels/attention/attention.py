"""Grouped-query attention over the paged cache: `kv_append`, then `attention` and `attention_join`
(attend.py).

Each is ordered after the one before it by a barrier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmc.codegen.ir import F32, I16, I32, I64, Emitter, Value, const
from hmc.codegen.isa import TIERS
from hmc.codegen.kernels.attention.attend import emit_join
from hmc.codegen.kernels.attention.attend_rows import Pages, Source
from hmc.codegen.kernels.attention.attend_task import emit_records
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import for_strips, load_f32, store_f32

Array = NDArray[Any]


@dataclass(frozen=True)
class Part:
    """`width` elements of what is appended: argument `source`, f32, to rows of `row` elements of
    argument `cache`, from element `column` on.
    """

    source: str
    cache: str
    width: int
    row: int
    column: int = 0


def emit_append(spec: KernelSpec, kv_heads: int, *parts: Part) -> str:
    """Split by (token, key head); a token at a negative position writes nothing."""
    e = Emitter(spec)
    b, lanes = e.b, TIERS[spec.isa].lanes
    start, stop = e.split(b.mul(e.arg["tokens"], const(kv_heads)))
    with e.for_range(start, stop) as item:
        token, head = b.udiv(item, const(kv_heads)), b.urem(item, const(kv_heads))
        position = e.load(e.arg["positions"], token, I32)
        with b.if_then(b.icmp_signed(">=", position, I32(0))):
            row = Pages(e, token, spec["block"], kv_heads).row(b.sext(position, I64), head)
            for part in parts:
                _copy(e, part, token, head, row, lanes)
    return e.finish()


def _copy(e: Emitter, part: Part, token: Value, head: Value, row: Value, lanes: int) -> None:
    """A part of one token and head to its row, rounded to bf16."""
    b = e.b
    index = b.add(b.mul(token, e.arg[f"{part.source}_stride"]), b.mul(head, const(part.width)))
    source = e.at(e.arg[part.source], index, F32)
    target = e.at(e.arg[part.cache], b.add(b.mul(row, const(part.row)), const(part.column)), I16)

    def strip(index: Value, count: int, way: int) -> None:
        value = load_f32(e, "f32", source, index, count, lanes)
        store_f32(e, "bf16", value, target, index, count)

    for_strips(e, part.width, lanes, strip, 2)


def emit_kv_append(spec: KernelSpec) -> str:
    """`kv_append`: k and v."""
    sizes = {"k": spec["head_dim"], "v": spec["v_dim"]}
    parts = (Part(name, f"{name}_cache", width, width) for name, width in sizes.items())
    return emit_append(spec, spec["kv_heads"], *parts)


def emit_attention(spec: KernelSpec) -> str:
    """`attention`: records of every (token, partition, head group)."""
    e = Emitter(spec)
    b, head_dim = e.b, spec["head_dim"]

    def query(token: Value, head: Value) -> Value:
        row = b.add(b.mul(token, e.arg["q_stride"]), b.mul(head, const(head_dim)))
        return e.at(e.arg["q"], row, F32)

    k, v = e.arg["k_cache"], e.arg["v_cache"]
    return emit_records(e, Source(((query, head_dim),), k, v, values_apart=True))


def emit_attention_join(spec: KernelSpec) -> str:
    """`attention_join`: y bf16."""
    e = Emitter(spec)
    return emit_join(e, e.arg["y"], e.arg["y_stride"])


def kv_append(cache: Array, rows: Array, blocks: Array, slots: Array) -> Array:
    """cache [blocks, kv_heads, block, dim] with rows [tokens, kv_heads, dim] at (block, slot) of
    each token.
    """
    result = cache.copy()
    for row, number, slot in zip(rows, blocks, slots, strict=True):
        result[number, :, slot] = row
    return result


def attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    tables: Array,
    sequence: Array,
    positions: Array,
    scale: float,
    window: int = 0,
) -> Array:
    """Attention of q [tokens, heads, head_dim] in float64: [tokens, heads, v_dim]."""
    tokens, heads, _ = q.shape
    _, kv_heads, block, v_dim = v_cache.shape
    y = np.zeros((tokens, heads, v_dim))
    for t in range(tokens):
        end = int(positions[t]) + 1
        first = max(0, end - window) if window else 0
        where = np.arange(first, end)
        numbers = tables[sequence[t]][where // block]
        for h in range(heads):
            g = h // (heads // kv_heads)
            keys = k_cache[numbers, g, where % block].astype(np.float64)
            values = v_cache[numbers, g, where % block].astype(np.float64)
            score = keys @ q[t, h].astype(np.float64) * scale
            weight = np.exp(score - score.max(initial=-np.inf))
            y[t, h] = weight @ values / weight.sum() if len(where) else 0.0
    return y
