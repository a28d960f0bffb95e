"""Streaming read and fill of a byte range: the memory bandwidth every other kernel is measured
against.

The read is tunable because a naive loop reaches half of what the memory gives: how many interleaved
streams a worker reads, how far ahead it prefetches and in which order it visits its share are all
parameters of the kernel.
"""

from __future__ import annotations

from hmc.codegen.ir import I8, I64, Emitter, Value, const, vec

CHUNK = 4096
SPLIT, PAGES = range(2)
"""Access orders. SPLIT: the share is cut into `streams` runs read side by side. PAGES: the share is
read front to back, `streams` neighbouring 4 KiB pages side by side. (Backward orders were tried:
always slower.)"""

_LINES = 4


def emit_stream_read(e: Emitter) -> None:
    """IR of `stream_read`: sink[worker] = xor of the share's 64-bit words (a ragged end
    zero-extended).

    params: streams (1 or more). tile: prefetch (bytes ahead, 0: none), order (SPLIT or PAGES).
    """
    b, spec = e.b, e.spec
    streams = spec.get("streams", 1)
    order = spec.tiled("order", SPLIT)
    words = spec.tier.vector_bits // 64
    kind = vec(I64, words)
    zero = e.zeros(I64, words)
    base = e.arg["base"]
    start, stop = e.split(e.arg["size"], CHUNK)
    pages = b.sdiv(b.sub(stop, start), const(CHUNK))
    rounds = b.sdiv(pages, const(streams))
    apart = const(CHUNK) if order == PAGES else b.mul(rounds, const(CHUNK))
    step = CHUNK * (streams if order == PAGES else 1)
    sums = [e.local(kind, zero) for _ in range(streams)]

    def page(position: Value, count: int) -> None:
        with e.for_range(const(0), const(CHUNK), 64 * _LINES) as within:
            for line in range(_LINES):
                for stream in range(count):
                    at = b.add(b.add(position, within), b.mul(apart, const(stream)))
                    pointer = e.offset(base, b.add(at, const(64 * line)))
                    if ahead := spec.tiled("prefetch", 0):
                        e.prefetch(e.offset(pointer, const(ahead)))
                    for part in range(0, 8, words):
                        loaded = e.load_vec(pointer, const(part), I64, words)
                        b.store(b.xor(b.load(sums[stream]), loaded), sums[stream])

    with e.for_range(const(0), rounds) as index:
        page(b.add(start, b.mul(index, const(step))), streams)
    rest = b.add(start, b.mul(b.mul(rounds, const(streams)), const(CHUNK)))
    whole = b.add(start, b.mul(pages, const(CHUNK)))
    with e.for_range(rest, whole, CHUNK) as position:
        page(position, 1)
    tail = e.local(I64, const(0))
    with e.for_range(whole, stop) as position:
        byte = b.zext(e.load(base, position, I8), I64)
        shift = b.mul(b.and_(position, const(7)), const(8))
        b.store(b.xor(b.load(tail), b.shl(byte, shift)), tail)

    total: Value = zero
    for slot in sums:
        total = b.xor(total, b.load(slot))
    result = b.load(tail)
    for lane in range(words):
        result = b.xor(result, b.extract_element(total, const(lane)))
    e.store(result, e.arg["sink"], e.worker, align=8)


def emit_stream_fill(e: Emitter) -> None:
    """IR of `stream_fill`: stores the word `value` over the worker's share (first touch puts it on
    the worker's node)."""
    b = e.b
    lanes = e.tier.vector_bits // 64
    start, stop = e.split(e.arg["size"], CHUNK)
    value = e.splat(e.arg["value"], lanes)
    whole = b.add(start, b.and_(b.sub(stop, start), const(-8 * lanes)))
    with e.for_range(start, whole, 8 * lanes) as position:
        e.store(value, e.offset(e.arg["base"], position), const(0))
    with e.for_range(whole, stop, 8) as position:
        e.store(e.arg["value"], e.offset(e.arg["base"], position), const(0))
