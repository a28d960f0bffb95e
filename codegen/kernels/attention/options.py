"""What some models ask of attention besides, alike for decode and prefill: bounds of what a token
sees (`window`, `chunk`), a function of scores, queries that grow with their position. Each is a
parameter of a spec, and where a spec has none, no code.
"""

from __future__ import annotations

from hmc.codegen import functions
from hmc.codegen.expr import elementwise
from hmc.codegen.ir import F32, I32, Emitter, Value, const
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import fsplat


def reach(spec: KernelSpec) -> int:
    """Most positions that a token sees; 0: all before it."""
    return spec.get("window") or spec.get("chunk")


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
