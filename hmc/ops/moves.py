"""Ops of schedules over several resources, which compute nothing: rows between host and devices,
between ranks and between lanes, and weights into slots.
"""

from __future__ import annotations

from functools import partial
from typing import Final, Literal

from hmc.ops.row import Op, Role

_ANY = "f32 bf16 i32"
_CACHED = ("latent", "k_rope", "k", "v", "indexer_k")
_ROWS = tuple(Role(name, "f32 bf16", optional=True) for name in _CACHED)
_SHARED = {"experts": int, "top_k": int, "range": str, "count": int, "what": str}


_EACH, _ORDER = Role("*", _ANY), Role("order", "i32", optional=True)


def _many(name: str, rows: Literal["tokens", "all"] = "tokens") -> tuple[Role, ...]:
    return (Role(name, _ANY, rows=rows, many=True),)


_move = partial(Op, captured=False, always=True)
_link = partial(_move, attrs={"bytes": int}, where="link", family="transfers")

OPS: Final = (
    # the same rows on another device, whatever the roles are called
    Op("copy", (_EACH,), (_EACH,), where="h2d d2h", captured=False, family="transfers"),
    # the weights named, or experts `range` of the layer, into a slot; with `order` those of them
    # alone that a token chose; without weights, the dense ones of decode back to their place
    _move("load", (_ORDER,), (), extra=_SHARED, where="h2d", family="transfers"),
    # a layer's new cache rows, which a copy brought, to the pages of the host's cache; and to the
    # GPU that decodes, where another one computed them
    _move("kv_out", _ROWS, (), where="cpu", family="attention"),
    _move("kv_in", _ROWS, (), where="h2d", family="attention"),
    # rows of all ranks on every rank (zig-zag: of 2R pieces rank r holds r and 2R - 1 - r)
    _link("all_gather", _many("x"), _many("y", "all")),
    # partial sums of all rows a rank, to each rank the sum of its own rows
    _link("exchange", _many("x", "all"), _many("y")),
    # rows of a batch to those of each lane, and back
    _move("split", (Role("x", _ANY),), _many("y"), family="norms and sums"),
    _move("join", _many("x"), (Role("y", _ANY),), family="norms and sums"),
)
