"""Tokens packed for the many-token matmul: bf16 rows to [chunk of K][tile][block][token], a block
being 4 words and a word what the micro-kernel multiplies (formats/micro.py).

What a round of a tile's loop reads of its tokens lies together, and the tile's share in one line:
hardware prefetchers like that better than one run a token (Zen 3: 6 % faster). Packing every word
of the tokens together was as fast, and takes transposes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hmc.codegen.formats.order import gather, room
from hmc.codegen.ir import F32, I8, I16, I32, I64, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.panel.tiling import CHUNK, Form

BLOCK = 16
"""Bytes of a token that lie together."""
_PTR = I8.as_pointer()


@contextmanager
def each_tile(e: Emitter, form: Form, tokens: Value) -> Iterator[tuple[Value, Value, Value]]:
    """For every tile that `tokens` are divided into: its number, first token and end."""
    b = e.b
    tiles = b.udiv(b.add(tokens, const(form.tile - 1)), const(form.tile))
    with e.for_range(0, tiles) as tile:
        first = b.udiv(b.mul(tokens, tile), tiles)
        yield tile, first, b.udiv(b.mul(tokens, b.add(tile, const(1))), tiles)


def factors_at(e: Emitter, form: Form, packed: Value, index: Value) -> Value:
    """f32* of the numbers of chunk and token `index` = chunk * tokens + token, of those packed at
    `packed`.
    """
    index = e.b.mul(index, const(form.token_numbers))
    return e.at(e.offset(packed, const(form.factors_offset)), index, F32)


def emit_pack(e: Emitter, form: Form) -> None:
    """Emit pack(packed, addresses of rows, tokens, order of columns where there is one): rows to
    x[chunk][tile][block][token of the tile], zero past K.
    """
    with e.subroutine("pack", _PTR, I64.as_pointer(), I64, _PTR) as (x, sources, tokens, order):
        b = e.b
        part = room(e, CHUNK) if form.ordered else None
        stride = b.mul(tokens, const(form.token_bytes))
        chunk = const(0)
        for length, chunks in form.lengths:
            with e.for_range(chunk, b.add(chunk, const(chunks))) as chunk_index:
                place = e.offset(x, b.mul(chunk_index, stride))
                with (
                    each_tile(e, form, tokens) as (_, first, end),
                    e.for_range(first, end) as token,
                ):
                    row = b.inttoptr(b.load(b.gep(sources, [token])), _PTR)
                    from_k = b.mul(chunk_index, const(CHUNK))
                    if part is not None:
                        gather(e, row, order, from_k, length, part)
                        row, from_k = part, const(0)
                    moved = b.mul(first, const(form.token_bytes))
                    moved = b.add(moved, b.mul(b.sub(token, first), const(BLOCK)))
                    start, apart = e.offset(place, moved), b.sub(end, first)
                    factor = None
                    if form.token_numbers:
                        index = b.add(b.mul(chunk_index, tokens), token)
                        factor = factors_at(e, form, x, index)
                    for vector, at in form.micro.pack(e, row, from_k, length, CHUNK, factor):
                        _store(e, vector, start, apart, at)
            chunk = const(chunks)


def _store(e: Emitter, value: Value, start: Value, apart: Value, at: int) -> None:
    """A vector of whole blocks, the bytes from `at` on of one token's share of a chunk, whose
    blocks lie `apart` blocks apart from `start` (i8*) on.
    """
    b = e.b
    bits = value.type.count * (16 if value.type.element == I16 else 32)
    words = b.bitcast(value, vec(I32, bits // 32))
    for block in range(bits // 8 // BLOCK):
        lanes = lanes_mask(list(range(4 * block, 4 * block + 4)))
        part = b.shuffle_vector(words, words, lanes)
        moved = b.mul(apart, const(at + block * BLOCK))
        e.store(part, e.offset(start, moved), const(0), align=4)
