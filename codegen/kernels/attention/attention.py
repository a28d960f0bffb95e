"""Attention of a few tokens over the paged cache, each record ordered after the one before it by a
barrier.

    kv_append, attention, attention_join                             grouped queries
    mla_absorb and mla_append, mla_attention, mla_attention_join, mla_up     latent, absorbed

Latent attention, absorbed: all heads attend to one latent cache row instead of keys and values of
their own. DeepSeek-V2 (arXiv 2405.04434), section 2.1.2 and appendix C: q_nope . (W_UK c) =
(q_nope W_UK) . c, and W_UV is applied to the weighted sum of latents. The cache row is [latent,
rotated key]; its first `rank` elements are the value as well. `mla_absorb` is in absorb.py, and
needs no barrier before `mla_append`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.codegen.decode.tiles import BYTES, FLOATS, Tiles
from hmc.codegen.formats.forms import dot_of
from hmc.codegen.ir import F32, I16, I32, I64, Emitter, Value, const
from hmc.codegen.kernels.attention.attend import emit_join, emit_records
from hmc.codegen.kernels.attention.attend_rows import Pages, Source
from hmc.codegen.vector import copy_row, load_f32, store_f32

_SLICE = 32
"""Rows of W_UV that are never shared between workers."""


@dataclass(frozen=True)
class Appended:
    """`width` elements of what is appended: argument `source`, f32, to rows of `row` elements of
    argument `cache`, from element `column` on.
    """

    source: str
    cache: str
    width: int
    row: int
    column: int = 0


def append(e: Emitter, kv_heads: int, *parts: Appended) -> None:
    """Split by (token, key head); a token at a negative position writes nothing."""
    b = e.b
    start, stop = e.split(b.mul(e.arg["tokens"], const(kv_heads)))
    with e.for_range(start, stop) as item:
        token, head = b.udiv(item, const(kv_heads)), b.urem(item, const(kv_heads))
        position = e.load(e.arg["positions"], token, I32)
        with b.if_then(b.icmp_signed(">=", position, I32(0))):
            row = Pages(e, token, e.spec["block"], kv_heads).row(b.sext(position, I64), head)
            for part in parts:
                _copy(e, part, token, head, row)


def _copy(e: Emitter, part: Appended, token: Value, head: Value, row: Value) -> None:
    """A part of one token and head to its row, rounded to bf16."""
    b = e.b
    source = e.row(part.source, token, head, part.width)
    target = e.at(e.arg[part.cache], b.add(b.mul(row, const(part.row)), const(part.column)), I16)
    copy_row(e, "f32", source, "bf16", target, part.width, 2)


def emit_kv_append(e: Emitter) -> None:
    """`kv_append`: k and v."""
    sizes = {"k": e.spec["head_dim"], "v": e.spec["v_dim"]}
    parts = (Appended(name, f"{name}_cache", width, width) for name, width in sizes.items())
    append(e, e.spec["kv_heads"], *parts)


def emit_attention(e: Emitter) -> None:
    """`attention`: records of every (token, partition, head group)."""
    head_dim = e.spec["head_dim"]

    def query(token: Value, head: Value) -> Value:
        return e.row("q", token, head, head_dim)

    k, v = e.arg["k_cache"], e.arg["v_cache"]
    emit_records(e, Source(((query, head_dim),), k, v, values_apart=True))


def emit_attention_join(e: Emitter) -> None:
    """`attention_join`: y bf16."""
    emit_join(e, e.arg["y"], e.arg["y_stride"])


def emit_mla_append(e: Emitter) -> None:
    """`mla_append`: the latent, then the rotated key, if any."""
    rank, rope = e.spec["rank"], e.spec["rope"]
    latent = Appended("latent", "cache", rank, rank + rope)
    rotated = (Appended("k_rope", "cache", rope, rank + rope, rank),) if rope else ()
    append(e, 1, latent, *rotated)


def emit_mla_attention(e: Emitter) -> None:
    """`mla_attention`: records of every (token, partition, head group)."""
    b, spec = e.b, e.spec
    heads, rank, nope, rope = spec["heads"], spec["rank"], spec["nope"], spec["rope"]

    def latent(token: Value, head: Value) -> Value:
        row = b.add(b.mul(token, const(heads)), head)
        return e.at(e.arg["q_latent"], b.mul(row, const(rank)), F32)

    def rotated(token: Value, head: Value) -> Value:
        row = b.add(b.mul(token, e.arg["q_stride"]), b.mul(head, const(nope + rope)))
        return e.at(e.arg["q"], b.add(row, const(nope)), F32)

    cache = e.arg["cache"]
    segments = ((latent, rank), (rotated, rope))[: 1 + (rope > 0)]
    emit_records(e, Source(segments, cache, cache, values_apart=False))


def emit_mla_attention_join(e: Emitter) -> None:
    """`mla_attention_join`: y_latent bf16."""
    emit_join(e, e.arg["y_latent"], const(e.spec["heads"] * e.spec["rank"]))


def emit_mla_up(e: Emitter) -> None:
    """`mla_up`: split by (head, `_SLICE` rows)."""
    b, spec, tokens = e.b, e.spec, e.arg["tokens"]
    heads, nope, v_dim, rank = (spec[name] for name in ("heads", "nope", "v_dim", "rank"))
    most = spec["tokens"]
    tiles = Tiles(e, dot_of(spec, rank), most)
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
            matrix = e.arg["w"], e.arg["scale"]
            xs = tiles.prepared(b.bitcast(latent, BYTES), tokens, stride, most, matrix[1])
            row = b.add(b.mul(head, const(nope + v_dim)), const(nope))
            first, last = b.add(row, low), b.add(row, high)
            next_row = b.mul(b.add(row, const(nope + v_dim)), const(tiles.dot.row_bytes))
            following = e.offset(e.arg["w"], next_row)
            tiles.matvec(matrix, first, last, xs, tokens, out, const(v_dim), following)
            with e.for_range(0, tokens) as token:
                line = e.at(out, b.mul(token, const(v_dim)), F32)
                at = b.add(b.mul(token, e.arg["y_stride"]), b.mul(head, const(v_dim)))
                target = e.at(e.arg["y"], b.add(at, low), I16)
                for index, width in e.in_vectors(b.sub(high, low), 16):
                    value = load_f32(e, "f32", line, index, width, width)
                    store_f32(e, "bf16", value, target, index, width)
