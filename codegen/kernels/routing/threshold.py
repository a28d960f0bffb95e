"""The k-th best of many numbers, exactly and without sorting: built from its highest bit down, by
counting.
"""

from __future__ import annotations

from hmc.codegen.ir import I32, I64, Emitter, Value, const, vec
from hmc.codegen.vector import isplat

LEAST = -(2**31)
"""The least number, which no score becomes (`ordered_key`)."""


def threshold(e: Emitter, keys: Value, padded: Value, most: Value) -> Value:
    """The largest number (i64) that at least `most` (i64) of `keys` i32 [padded] reach, whole
    vectors; the least of all where they are fewer.
    """
    b = e.b
    least = e.local(I64, const(LEAST))
    with e.for_range(0, 32) as turn:
        bit = b.shl(const(1), b.sub(const(31), turn))
        bound = b.add(b.load(least), bit)
        enough = b.icmp_signed(">=", reaching(e, keys, padded, bound), most)
        b.store(b.select(enough, bound, b.load(least)), least)
    return b.load(least)


def reaching(e: Emitter, keys: Value, padded: Value, bound: Value) -> Value:
    """How many of `keys` are at least `bound`, which is above the least number."""
    b, lanes = e.b, e.lanes
    low, found = e.splat(b.trunc(bound, I32), lanes), e.local(vec(I32, lanes), isplat(0, lanes))
    with e.for_range(0, padded, lanes) as index:
        reaches = b.icmp_signed(">=", e.load_vec(keys, index, I32, lanes), low)
        b.store(b.sub(b.load(found), b.sext(reaches, vec(I32, lanes))), found)
    return b.sext(e.call(f"llvm.vector.reduce.add.v{lanes}i32", I32, b.load(found)), I64)
