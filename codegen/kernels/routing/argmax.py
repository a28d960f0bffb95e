"""Greedy choice over the vocabulary: every worker scans its slice, then one comparison of the
slices' winners.

Scratch is i32 [tokens, workers, 2]: ordered key and id (route.py says what a key is: NaN counts as
-inf). The largest key wins and the lowest id among equals, so the result does not depend on how the
vocabulary was cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmc.codegen.ir import F32, I32, Emitter, Value, const, vec
from hmc.codegen.isa import TIERS
from hmc.codegen.kernels.routing.route import lane_numbers, ordered_key, reduce_int
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import isplat, lanes_mask, load_f32

Array = NDArray[Any]

_LOWEST, _LAST = -(2**31), 2**31 - 1


def argmax_scratch_bytes(tokens: int, workers: int) -> int:
    """Bytes of `scratch`; `workers` is also the `parts` of `argmax_join`."""
    return 8 * tokens * workers


def emit_argmax_part(spec: KernelSpec) -> str:
    """`argmax_part`: the best of each token in this worker's slice of the vocabulary."""
    e = Emitter(spec)
    b, lanes, vocab = e.b, TIERS[spec.isa].lanes, spec["vocab"]
    start, stop = e.split(const(vocab), 4 * lanes)
    whole = e.minimum(stop, const(vocab // lanes * lanes))
    words = vec(I32, lanes)
    with e.for_range(0, e.arg["tokens"]) as token:
        logits = e.at(e.arg["logits"], b.mul(token, e.arg["logits_stride"]), F32)
        top, where = e.local(words, isplat(_LOWEST, lanes)), e.local(words, isplat(_LAST, lanes))

        def take(
            index: Value, count: int, logits: Value = logits, top: Value = top, where: Value = where
        ) -> None:
            key = ordered_key(e, load_f32(e, "f32", logits, index, count, lanes))
            keep = lanes_mask([lane if lane < count else lanes for lane in range(lanes)])
            key = b.shuffle_vector(key, isplat(_LOWEST, lanes), keep)
            old = b.load(top)
            more = b.icmp_signed(">", key, old)
            place = b.add(e.splat(b.trunc(index, I32), lanes), lane_numbers(lanes))
            b.store(b.select(more, key, old), top)
            b.store(b.select(more, place, b.load(where)), where)

        with e.for_range(start, whole, lanes) as index:
            take(index, lanes)
        if vocab % lanes:
            owner = b.and_(b.icmp_signed("<", start, stop), b.icmp_signed("==", stop, const(vocab)))
            with b.if_then(owner):
                take(const(vocab // lanes * lanes), vocab % lanes)
        best = reduce_int(e, "smax", b.load(top))
        equal = b.icmp_signed("==", b.load(top), e.splat(best, lanes))
        first = reduce_int(e, "smin", b.select(equal, b.load(where), isplat(_LAST, lanes)))
        record = b.shl(b.add(b.mul(token, e.workers), e.worker), const(1))
        e.store(best, e.arg["scratch"], record)
        e.store(first, e.arg["scratch"], b.add(record, const(1)))
    return e.finish()


def emit_argmax_join(spec: KernelSpec) -> str:
    """`argmax_join`: split by token."""
    e = Emitter(spec)
    b = e.b
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        top, where = e.local(I32, I32(_LOWEST)), e.local(I32, I32(_LAST))
        with e.for_range(0, e.arg["parts"]) as part:
            record = b.shl(b.add(b.mul(token, e.arg["parts"]), part), const(1))
            key = e.load(e.arg["scratch"], record, I32)
            place = e.load(e.arg["scratch"], b.add(record, const(1)), I32)
            old, old_place = b.load(top), b.load(where)
            wins = b.or_(
                b.icmp_signed(">", key, old),
                b.and_(b.icmp_signed("==", key, old), b.icmp_signed("<", place, old_place)),
            )
            b.store(b.select(wins, key, old), top)
            b.store(b.select(wins, place, old_place), where)
        e.store(b.load(where), e.arg["best"], token)
    return e.finish()


def argmax(logits: Array) -> Array:
    """Lowest index of the largest logit of each row; NaN counts as -inf."""
    clean = np.where(np.isnan(logits), -np.inf, logits)
    result: Array = np.argmax(clean, axis=1)
    return result


EMITTERS = {"argmax_part": emit_argmax_part, "argmax_join": emit_argmax_join}
REFERENCES = {"argmax_part": argmax, "argmax_join": argmax}
