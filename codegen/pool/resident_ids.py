"""`resident_ids`: the experts a token is routed to, -1 in place of those that are elsewhere, for a
step that computes some of a layer's experts only. Each worker does its share of the tokens.
"""

from __future__ import annotations

from llvmlite import ir

from hmc.codegen.ir import I32, I64, Emitter, const


def emit_resident_ids(e: Emitter) -> None:
    """IR of `resident_ids`; param top_k."""
    b = e.b
    start, stop = (b.mul(edge, const(e.spec["top_k"])) for edge in e.split(e.arg["tokens"]))
    with e.for_range(start, stop) as pair:
        expert = e.load(e.arg["ids"], pair, I32, align=4)
        here = e.load(e.arg["mask"], b.sext(expert, I64), I32, align=4)
        held = b.icmp_unsigned("!=", here, ir.Constant(I32, 0))
        chosen = b.select(held, expert, ir.Constant(I32, -1))
        e.store(chosen, e.arg["out"], pair, align=4)
