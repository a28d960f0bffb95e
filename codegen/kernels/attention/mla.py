"""Multi-head latent attention, absorbed: all heads attend to one latent cache row instead of keys
and values of their own.

    mla_absorb, mla_append (absorb.py; they need no barrier between them), barrier,
    mla_attention, barrier, mla_attention_join (attend.py), barrier, mla_up

DeepSeek-V2 (arXiv 2405.04434), section 2.1.2 and appendix C: q_nope . (W_UK c) = (q_nope W_UK) . c,
and W_UV is applied to the weighted sum of latents. The cache row is [latent, rotated key]; its
first `rank` elements are the value as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmc.codegen.decode.tiles import BYTES, FLOATS, Tiles
from hmc.codegen.formats.table import dot_of
from hmc.codegen.ir import F32, I16, I32, Emitter, Value, const
from hmc.codegen.kernels.attention.attend import Shape, Walk, emit_join
from hmc.codegen.kernels.attention.attend_rows import Source
from hmc.codegen.kernels.attention.attend_task import Task
from hmc.codegen.kernels.attention.attention import cache_row, copy_to_bf16
from hmc.codegen.kernels.matmul.linear import addresses
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import load_f32, store_f32

Array = NDArray[Any]

_SLICE = 32
"""Rows of W_UV that are never shared between workers."""


def _shape(spec: KernelSpec) -> Shape:
    row = spec["rank"] + spec["rope"]
    return Shape(
        isa=spec.isa,
        heads=spec["heads"],
        kv_heads=1,
        key=row,
        value=spec["rank"],
        key_row=row,
        value_row=row,
        block=spec["block"],
        window=spec.get("window"),
        terms=spec.tiled("terms", 1),
    )


def mla_scratch_bytes(spec: KernelSpec, tokens: int, max_context: int) -> int:
    """Bytes of `scratch` of `mla_attention` and its join, for `tokens` of at most `max_context`
    positions.
    """
    return _shape(spec).scratch_bytes(tokens, max_context)


def emit_mla_append(spec: KernelSpec) -> str:
    """`mla_append`: split by token; a token at a negative position writes nothing."""
    e = Emitter(spec)
    b, rank, rope, block = e.b, spec["rank"], spec["rope"], spec["block"]
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        position = e.load(e.arg["positions"], token, I32)
        with b.if_then(b.icmp_signed(">=", position, I32(0))):
            number, slot = cache_row(e, token, block)
            row = b.add(b.mul(number, const(block)), slot)
            target = e.at(e.arg["cache"], b.mul(row, const(rank + rope)), I16)
            latent = e.at(e.arg["latent"], b.mul(token, e.arg["latent_stride"]), F32)
            copy_to_bf16(e, latent, target, rank)
            key = e.at(e.arg["k_rope"], b.mul(token, e.arg["k_rope_stride"]), F32)
            copy_to_bf16(e, key, e.at(target, const(rank), I16), rope)
    return e.finish()


def emit_mla_attention(spec: KernelSpec) -> str:
    """`mla_attention`: records of every (token, partition, head group)."""
    e = Emitter(spec)
    b, heads, rank, nope, rope = e.b, spec["heads"], spec["rank"], spec["nope"], spec["rope"]

    def latent(token: Value, head: Value) -> Value:
        row = b.add(b.mul(token, const(heads)), head)
        return e.at(e.arg["q_latent"], b.mul(row, const(rank)), F32)

    def rotated(token: Value, head: Value) -> Value:
        row = b.add(b.mul(token, e.arg["q_stride"]), b.mul(head, const(nope + rope)))
        return e.at(e.arg["q"], b.add(row, const(nope)), F32)

    cache = e.arg["cache"]
    source = Source(((latent, rank), (rotated, rope)), cache, cache, values_apart=False)
    task, walk = Task(e, _shape(spec), source), Walk(e, _shape(spec))
    walk.tasks(lambda t, p, g, number, more: task.emit(t, p, g, walk.record(number), more, walk))
    return e.finish()


def emit_mla_attention_join(spec: KernelSpec) -> str:
    """`mla_attention_join`: y_latent bf16."""
    stride = const(spec["heads"] * spec["rank"])
    return emit_join(spec, _shape(spec), "y_latent", lambda e: stride)


def emit_mla_up(spec: KernelSpec) -> str:
    """`mla_up`: split by (head, `_SLICE` rows)."""
    e = Emitter(spec)
    b, heads, nope, v_dim, rank = e.b, spec["heads"], spec["nope"], spec["v_dim"], spec["rank"]
    most = spec["tokens"]
    dot = dot_of(spec, rank)
    tiles = Tiles(e, dot, most)
    w, tokens = e.arg["w"], e.arg["tokens"]
    out = b.bitcast(e.local(F32, count=most * v_dim), FLOATS)
    slices = -(-v_dim // _SLICE)
    start, stop = e.split(const(heads * slices))
    head_stop = b.udiv(b.add(stop, const(slices - 1)), const(slices))
    with e.for_range(b.udiv(start, const(slices)), head_stop) as head:
        begin = b.mul(head, const(slices))
        low = b.sub(start, begin)
        low = b.mul(b.select(b.icmp_signed("<", low, const(0)), const(0), low), const(_SLICE))
        high = e.minimum(b.mul(b.sub(stop, begin), const(_SLICE)), const(v_dim))
        with b.if_then(b.icmp_signed("<", low, high)):
            latent = e.at(e.arg["y_latent"], b.mul(head, const(rank)), I16)
            stride = const(heads * rank)
            prepared = tiles.prepare(e, b.bitcast(latent, BYTES), tokens, stride, most)
            xs = addresses(e, prepared, tokens, dot.prepared_bytes, most)
            row = b.add(b.mul(head, const(nope + v_dim)), const(nope))
            first, last = b.add(row, low), b.add(row, high)
            following = e.offset(w, b.mul(b.add(row, const(nope + v_dim)), const(dot.row_bytes)))
            tiles.matvec(
                e, w, e.arg["scale"], first, last, xs, tokens, out, const(v_dim), following
            )
            with e.for_range(0, tokens) as token:
                line = e.at(out, b.mul(token, const(v_dim)), F32)
                at = b.add(b.mul(token, e.arg["y_stride"]), b.mul(head, const(v_dim)))
                target = e.at(e.arg["y"], b.add(at, low), I16)
                for index, width in e.in_vectors(b.sub(high, low), 16):
                    value = load_f32(e, "f32", line, index, width, width)
                    store_f32(e, "bf16", value, target, index, width)
    return e.finish()


def mla_append(cache: Array, rows: Array, blocks: Array, slots: Array) -> Array:
    """cache [blocks, block, rank + rope] with rows [tokens, rank + rope] at (block, slot) of each
    token.
    """
    result = cache.copy()
    result[blocks, slots] = rows
    return result


def mla_attention(
    q: Array,
    q_latent: Array,
    cache: Array,
    tables: Array,
    sequence: Array,
    positions: Array,
    scale: float,
) -> Array:
    """Weighted latents [tokens, heads, rank] in float64; q [tokens, heads, nope + rope]."""
    tokens, heads, rank = q_latent.shape
    block, row = cache.shape[1:]
    rope = row - rank
    y = np.zeros((tokens, heads, rank))
    for t in range(tokens):
        where = np.arange(int(positions[t]) + 1)
        if not len(where):
            continue
        rows = cache[tables[sequence[t]][where // block], where % block].astype(np.float64)
        query = np.concatenate([q_latent[t], q[t, :, q.shape[2] - rope :]], axis=1)
        score = query.astype(np.float64) @ rows.T * scale
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        y[t] = weight @ rows[:, :rank] / weight.sum(axis=1, keepdims=True)
    return y


def mla_up(y_latent: Array, w: Array, nope: int) -> Array:
    """y [tokens, heads, v_dim] in float64; w [heads, nope + v_dim, rank] (scales applied)."""
    result: Array = np.einsum("thr,hvr->thv", y_latent.astype(np.float64), w[:, nope:])
    return result
