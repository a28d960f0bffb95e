"""`pool_positions`: of the pools that a token chose, what positions these are; behind them those of
the pool that is open.
"""

from __future__ import annotations

from hmc.codegen.ir import I32, Emitter, Value, const


def emit_pool_positions(e: Emitter) -> None:
    """`pool_positions`: split by token."""
    b, pool = e.b, const(e.spec["pool"])
    most = e.spec["index_topk"]
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        seen = e.positive(b.add(e.load_int(e.arg["positions"], token), const(1)))
        pools, target = e.row("pools", token, element=I32), e.row("chosen", token, element=I32)
        ended = b.udiv(seen, pool)
        count = e.minimum(ended, const(most // e.spec["pool"]))
        with e.for_range(0, count) as index:
            number = e.load_int(pools, index)
            _follow(e, b.mul(number, pool), pool, target, b.mul(index, pool))
        first, at = b.mul(ended, pool), b.mul(count, pool)
        rest = b.sub(seen, first)
        _follow(e, first, rest, target, at)
        with e.for_range(b.add(at, rest), most + e.spec["pool"] - 1) as index:
            e.store_int(const(-1), target, index)


def _follow(e: Emitter, first: Value, count: Value, target: Value, at: Value) -> None:
    """target[at + i] = first + i."""
    with e.for_range(0, count) as index:
        e.store_int(e.b.add(first, index), target, e.b.add(at, index))
