"""Grouped-query attention over the paged cache: `kv_append`, then `attention` and `attention_join`
(attend.py).

Each is ordered after the one before it by a barrier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmc.codegen.ir import F32, I16, I32, I64, Emitter, Value, const
from hmc.codegen.isa import TIERS
from hmc.codegen.kernels.attention.attend import Shape, Walk, emit_join
from hmc.codegen.kernels.attention.attend_rows import Source
from hmc.codegen.kernels.attention.attend_task import Task
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import for_strips, load_f32, store_f32

Array = NDArray[Any]


def _shape(spec: KernelSpec) -> Shape:
    return Shape(
        isa=spec.isa,
        heads=spec["heads"],
        kv_heads=spec["kv_heads"],
        key=spec["head_dim"],
        value=spec["v_dim"],
        key_row=spec["head_dim"],
        value_row=spec["v_dim"],
        block=spec["block"],
        window=spec.get("window"),
        terms=spec.tiled("terms", 2),
    )


def attention_scratch_bytes(spec: KernelSpec, tokens: int, max_context: int) -> int:
    """Bytes of `scratch` of `attention` and `attention_join`, for `tokens` of at most `max_context`
    positions.
    """
    return _shape(spec).scratch_bytes(tokens, max_context)


def cache_row(e: Emitter, token: Value, block: int) -> tuple[Value, Value]:
    """Block number and slot in it of `token`'s own position."""
    b = e.b
    sequence = b.sext(e.load(e.arg["sequence"], token, I32), I64)
    position = b.sext(e.load(e.arg["positions"], token, I32), I64)
    entry = b.add(b.mul(sequence, e.arg["table_stride"]), b.sdiv(position, const(block)))
    number = b.sext(e.load(e.arg["tables"], entry, I32), I64)
    return number, b.srem(position, const(block))


def copy_to_bf16(e: Emitter, source: Value, target: Value, width: int) -> None:
    """target[:] bf16 = source[:] f32."""
    lanes = TIERS[e.spec.isa].lanes

    def strip(index: Value, count: int, way: int) -> None:
        value = load_f32(e, "f32", source, index, count, lanes)
        store_f32(e, "bf16", value, target, index, count)

    for_strips(e, width, lanes, strip, 2)


def emit_kv_append(spec: KernelSpec) -> str:
    """`kv_append`: split by (token, key head); a token at a negative position writes nothing."""
    e = Emitter(spec)
    b, kv_heads, block = e.b, spec["kv_heads"], spec["block"]
    start, stop = e.split(b.mul(e.arg["tokens"], const(kv_heads)))
    with e.for_range(start, stop) as item:
        token, head = b.udiv(item, const(kv_heads)), b.urem(item, const(kv_heads))
        position = e.load(e.arg["positions"], token, I32)
        with b.if_then(b.icmp_signed(">=", position, I32(0))):
            number, slot = cache_row(e, token, block)
            row = b.add(b.mul(number, const(kv_heads)), head)
            row = b.add(b.mul(row, const(block)), slot)
            for name, width in (("k", spec["head_dim"]), ("v", spec["v_dim"])):
                index = b.add(b.mul(token, e.arg[f"{name}_stride"]), b.mul(head, const(width)))
                source = e.at(e.arg[name], index, F32)
                target = e.at(e.arg[f"{name}_cache"], b.mul(row, const(width)), I16)
                copy_to_bf16(e, source, target, width)
    return e.finish()


def emit_attention(spec: KernelSpec) -> str:
    """`attention`: records of every (token, partition, head group)."""
    e = Emitter(spec)
    b, head_dim = e.b, spec["head_dim"]
    shape = _shape(spec)

    def query(token: Value, head: Value) -> Value:
        row = b.add(b.mul(token, e.arg["q_stride"]), b.mul(head, const(head_dim)))
        return e.at(e.arg["q"], row, F32)

    source = Source(((query, head_dim),), e.arg["k_cache"], e.arg["v_cache"], values_apart=True)
    task, walk = Task(e, shape, source), Walk(e, shape)
    walk.tasks(lambda t, p, g, number, more: task.emit(t, p, g, walk.record(number), more, walk))
    return e.finish()


def emit_attention_join(spec: KernelSpec) -> str:
    """`attention_join`: y bf16."""
    return emit_join(spec, _shape(spec), "y", lambda e: e.arg["y_stride"])


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
