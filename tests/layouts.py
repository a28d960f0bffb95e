"""Cache layouts to try things with."""

from __future__ import annotations

from collections.abc import Sequence

from hmc.ops import State
from hmc.plan import KVLayout, state_groups


def layout(
    *states: State,
    block: int,
    tokens: int,
    sequences: int,
    snapshots: int = 0,
    layers: Sequence[int] = (0,),
) -> KVLayout:
    """All layers keep `states`; pages of `block` tokens for `tokens`."""
    return KVLayout(
        block=block,
        capacity_tokens=tokens,
        sequences=sequences,
        snapshots=snapshots,
        groups=state_groups((layer, states) for layer in layers),
    )


def keys_and_values(key: int, value: int) -> tuple[State, State]:
    """The states of grouped-query attention of so many elements."""
    return State("k", key), State("v", value)
