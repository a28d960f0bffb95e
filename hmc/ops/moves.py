"""Ops of schedules over several resources, which compute nothing: rows between host and devices,
between ranks and between lanes, and weights into slots.
"""

from __future__ import annotations

from typing import Final, Literal

from hmc.ops.row import Op, Role

_ANY = "f32 bf16 i32"
_ROWS = tuple(Role(name, "f32 bf16", optional=True) for name in ("latent", "k_rope", "k", "v"))
_SHARED = {"experts": int, "top_k": int, "range": str, "count": int, "what": str}


_EACH = Role("*", _ANY)


def _many(name: str, rows: Literal["tokens", "all"] = "tokens") -> tuple[Role, ...]:
    return (Role(name, _ANY, rows=rows, many=True),)


OPS: Final = (
    # the same rows on another device, whatever the roles are called
    Op("copy", (_EACH,), (_EACH,), where="h2d d2h", captured=False, family="transfers"),
    # the weights named, or experts `range` of the layer, into a slot; with `order` those of them
    # alone that a token chose; without weights, the dense ones of decode back to their place
    Op(
        "load",
        (Role("order", "i32", optional=True),),
        (),
        extra=_SHARED,
        where="h2d",
        captured=False,
        always=True,
        family="transfers",
    ),
    # a layer's new cache rows, which a copy brought, to the pages of the host's cache; and to the
    # GPU that decodes, where another one computed them
    Op("kv_out", _ROWS, (), where="cpu", captured=False, always=True, family="attention"),
    Op("kv_in", _ROWS, (), where="h2d", captured=False, always=True, family="attention"),
    # rows of all ranks on every rank (zig-zag: of 2R pieces rank r holds r and 2R - 1 - r)
    Op(
        "all_gather",
        _many("x"),
        _many("y", "all"),
        attrs={"bytes": int},
        where="link",
        captured=False,
        always=True,
        family="transfers",
    ),
    # partial sums of all rows a rank, to each rank the sum of its own rows
    Op(
        "exchange",
        _many("x", "all"),
        _many("y"),
        attrs={"bytes": int},
        where="link",
        captured=False,
        always=True,
        family="transfers",
    ),
    # rows of a batch to those of each lane, and back
    Op(
        "split",
        (Role("x", _ANY),),
        _many("y"),
        captured=False,
        always=True,
        family="norms and sums",
    ),
    Op(
        "join",
        _many("x"),
        (Role("y", _ANY),),
        captured=False,
        always=True,
        family="norms and sums",
    ),
)
