"""What layers keep between calls: the layout of the cache, made of what the rows of ops say.

Hides pages, slots and how states of several ops of a layer come together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field

from hmc.errors import VerifyError
from hmc.ops import State
from hmc.plan.base import Count, Frozen


class StateGroup(Frozen):
    """Layers that keep the same states; no layer is in two groups, no name twice in one."""

    layers: tuple[int, ...]
    states: tuple[State, ...]

    def bytes_per(self, per: Literal["token", "sequence"]) -> int:
        """Bytes of one token or sequence in all layers of the group."""
        return len(self.layers) * sum(state.bytes for state in self.states if state.per == per)


class KVLayout(Frozen):
    """What all layers keep between calls, by layer and name of a state.

    States a token are in pages of `block` tokens, which all layers number alike; `capacity_tokens`
    fit. States a sequence are in slots: one for each of `sequences`, and `snapshots` more that hold
    those of prompts as they were at the end of a page, for prompts that begin alike.
    """

    block: Annotated[int, Field(ge=1)]
    capacity_tokens: Count
    sequences: Count
    snapshots: Count = 0
    groups: tuple[StateGroup, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that keep something, ascending."""
        return tuple(sorted(layer for group in self.groups for layer in group.layers))

    def states(self, layer: int) -> tuple[State, ...]:
        """The states of a layer; none where it is in no group."""
        return next((group.states for group in self.groups if layer in group.layers), ())

    def state(self, layer: int, name: str) -> State:
        """A layer's state of a name; `KeyError` when it has none."""
        for state in self.states(layer):
            if state.name == name:
                return state
        raise KeyError(f"layer {layer} keeps no state {name}")

    def each(self) -> Iterator[tuple[int, State]]:
        """All states with their layers, in the order in which they lie in memory."""
        for group in self.groups:
            for layer in group.layers:
                for state in group.states:
                    yield layer, state

    def widest(self, name: str) -> int:
        """Elements of the widest state of a name; 0 when no layer has it."""
        return max((state.width for _, state in self.each() if state.name == name), default=0)

    @property
    def blocks(self) -> int:
        """Pages there are."""
        return -(-self.capacity_tokens // self.block)

    @property
    def slots(self) -> int:
        """Slots there are: those of sequences, then those of snapshots."""
        return self.sequences + self.snapshots

    def rows(self, state: State) -> int:
        """How many tokens or slots a state's tensor has room for."""
        return self.slots if state.per == "sequence" else self.blocks * self.block

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        return sum(group.bytes_per("token") for group in self.groups)

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes over all layers that a sequence takes whatever its length."""
        return sum(group.bytes_per("sequence") for group in self.groups)


def state_groups(kept: Iterable[tuple[int, Iterable[State]]]) -> tuple[StateGroup, ...]:
    """Groups of layers by what they keep, first layers first, from (layer, states of an op).

    A state may come again as it is (an op runs on several devices); `VerifyError` where two of one
    layer share a name and differ.
    """
    layers: dict[int, dict[str, State]] = {}
    for layer, states in kept:
        for state in states:
            if layers.setdefault(layer, {}).setdefault(state.name, state) != state:
                raise VerifyError(f"layer {layer} keeps two states named {state.name}")
    groups: dict[tuple[State, ...], list[int]] = {}
    for layer, named in sorted(layers.items()):
        groups.setdefault(tuple(named.values()), []).append(layer)
    return tuple(StateGroup(layers=tuple(of), states=states) for states, of in groups.items())
