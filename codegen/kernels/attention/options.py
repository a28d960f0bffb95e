"""What some models ask of attention besides, alike for decode and prefill: bounds of what a token
sees (`window`, `chunk`), blocks that it chose (`index_topk` of `index_block` positions), a function
of scores, queries that grow with their position. Each is a parameter of a spec, and where a spec
has none, no code.
"""

from __future__ import annotations

from hmc.codegen import functions
from hmc.codegen.expr import elementwise
from hmc.codegen.ir import F32, I32, Emitter, Value, const
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import fsplat


def reach(spec: KernelSpec) -> int:
    """Most positions up to its own that a token sees; 0: all of them."""
    return spec.get("window") or spec.get("chunk")


def most_read(spec: KernelSpec) -> int:
    """Most positions that a token reads, whether they follow each other or not; 0: all."""
    return reach(spec) or spec.get("index_topk") * spec.get("index_block")


def read_count(e: Emitter, position: Value) -> Value:
    """How many positions a token at `position` (not negative) reads, where it sees all or chose
    blocks; its own is the last of these.
    """
    b, block = e.b, e.spec.get("index_block")
    end = b.add(position, const(1))
    if not block:
        return end
    most = e.spec["index_topk"]
    inside = b.add(b.urem(position, const(block)), const(1 + (most - 1) * block))
    return b.select(b.icmp_signed("<", b.udiv(position, const(block)), const(most)), end, inside)


def chosen_place(e: Emitter, token: Value, kv_head: Value, number: Value) -> Value:
    """Position of the `number`-th that a token reads with a key head."""
    b, size = e.b, const(e.spec.get("index_block"))
    if not e.spec.get("index_block"):
        return number
    most = e.spec["index_topk"]
    head = b.udiv(kv_head, const(e.spec["kv_heads"] // e.spec["index_heads"]))
    block = e.load_int(e.row("chosen", token, head, most, I32), b.udiv(number, size))
    return b.add(b.mul(block, size), b.urem(number, size))


def first_seen(e: Emitter, position: Value) -> Value:
    """The first position that a token at `position` sees; i64, `position` not negative."""
    b = e.b
    if chunk := e.spec.get("chunk"):
        return b.mul(b.udiv(position, const(chunk)), const(chunk))
    if window := e.spec.get("window"):
        return e.positive(b.sub(position, const(window - 1)))
    return const(0)


def capped(e: Emitter, score: Value) -> Value:
    """What the spec's expression makes of scaled scores, a vector of f32."""
    tree = elementwise(e.spec.expr, "score")
    return functions.emit(e, tree, {"score": score}.__getitem__, score.type.count)


def grown(e: Emitter, scale: Value, position: Value) -> Value:
    """`scale` f32 times what queries at `position` (i64) are multiplied by."""
    b, every = e.b, e.spec.get("growth_every")
    if not every:
        return scale
    steps = b.udiv(b.add(position, const(e.spec.get("growth_from"))), const(every))
    steps = e.splat(b.sitofp(b.add(steps, const(1)), F32), 4)
    factor = e.fma(e.splat(e.arg["growth"], 4), functions.log(e, steps), fsplat(1.0, 4))
    return b.fmul(scale, b.extract_element(factor, I32(0)))
