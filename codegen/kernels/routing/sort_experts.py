"""`sort_experts`: the (token, slot) pairs in the order of their experts, as the grouped kernels
take them.

A counting sort, stable, so slots ascend within each expert. Every worker counts all ids (they are
few next to the matmuls that follow) and then places the slots of its own share of the experts;
nobody needs what another wrote. Slots with a negative id belong to no expert here and are left out.
"""

from __future__ import annotations

from hmc.codegen.decode.tiles import BYTES
from hmc.codegen.ir import I32, I64, Emitter, const


def emit_sort_experts(e: Emitter) -> None:
    """IR of `sort_experts`; params top_k, experts."""
    b, spec = e.b, e.spec
    experts = -(-spec["experts"] // 16) * 16
    counts = b.bitcast(e.local(I32, count=experts), BYTES)
    with e.for_range(0, experts, 16) as expert:
        e.store(e.zeros(I32, 16), counts, expert)
    pairs = b.mul(e.arg["tokens"], const(spec["top_k"]))
    with e.for_range(0, pairs) as pair:
        expert = e.load_int(e.arg["ids"], pair, 4)
        with b.if_then(b.icmp_signed(">=", expert, const(0))):
            e.store_int(b.add(e.load_int(counts, expert, 4), const(1)), counts, expert, 4)
    start, stop = e.split(const(spec["experts"]))
    total = e.local(I64, const(0))
    with e.for_range(0, stop) as expert:
        first = b.load(total)
        b.store(b.add(first, e.load_int(counts, expert, 4)), total)
        e.store_int(first, counts, expert, 4)
        with b.if_then(b.icmp_signed(">=", expert, start)):
            e.store_int(b.load(total), e.arg["offsets"], b.add(expert, const(1)), 4)
    with b.if_then(b.icmp_signed("==", e.worker, const(0))):
        e.store_int(const(0), e.arg["offsets"], const(0), 4)
    with e.for_range(0, pairs) as pair:
        expert = e.load_int(e.arg["ids"], pair, 4)
        own = b.and_(b.icmp_signed(">=", expert, start), b.icmp_signed("<", expert, stop))
        with b.if_then(own):
            place = e.load_int(counts, expert, 4)
            e.store_int(pair, e.arg["slots"], place, 4)
            e.store_int(b.add(place, const(1)), counts, expert, 4)
