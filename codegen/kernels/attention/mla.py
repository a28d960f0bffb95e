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
from hmc.codegen.ir import F32, I16, Emitter, Value, const
from hmc.codegen.kernels.attention.attend import emit_join
from hmc.codegen.kernels.attention.attend_rows import Source
from hmc.codegen.kernels.attention.attend_task import emit_records
from hmc.codegen.kernels.attention.attention import Part, attention, emit_append
from hmc.codegen.kernels.matmul.linear import addresses
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import load_f32, store_f32

Array = NDArray[Any]

_SLICE = 32
"""Rows of W_UV that are never shared between workers."""


def emit_mla_append(spec: KernelSpec) -> str:
    """`mla_append`: the latent, then the rotated key."""
    rank, rope = spec["rank"], spec["rope"]
    latent = Part("latent", "cache", rank, rank + rope)
    return emit_append(spec, 1, latent, Part("k_rope", "cache", rope, rank + rope, rank))


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
    segments = (latent, rank), (rotated, rope)
    return emit_records(e, Source(segments, cache, cache, values_apart=False))


def emit_mla_attention_join(spec: KernelSpec) -> str:
    """`mla_attention_join`: y_latent bf16."""
    e = Emitter(spec)
    return emit_join(e, e.arg["y_latent"], const(spec["heads"] * spec["rank"]))


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
        low = b.mul(e.positive(b.sub(start, begin)), const(_SLICE))
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
    rank = q_latent.shape[2]
    query = np.concatenate([q_latent, q[..., q.shape[2] + rank - cache.shape[2] :]], axis=2)
    rows = cache[:, None]
    return attention(query, rows, rows[..., :rank], tables, sequence, positions, scale)


def mla_up(y_latent: Array, w: Array, nope: int) -> Array:
    """y [tokens, heads, v_dim] in float64; w [heads, nope + v_dim, rank] (scales applied)."""
    result: Array = np.einsum("thr,hvr->thv", y_latent.astype(np.float64), w[:, nope:])
    return result
