"""What layers keep between calls: the layout of the cache, made of what the rows of ops say.

Hides pages, slots and how states of several ops of a layer come together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from hmc.errors import VerifyError
from hmc.ops import State
from hmc.plan.base import Count, Frozen

SPACING = 8
"""Pages between the end of a prompt and the first of the sparse snapshots before it."""


class Stop(NamedTuple):
    """After so many `tokens` of a prompt its states are worth a snapshot; a `sparse` one is lost
    before others.
    """

    tokens: int
    sparse: bool


class StateGroup(Frozen):
    """Layers that keep the same states; no layer is in two groups, no name twice in one."""

    layers: tuple[int, ...]
    states: tuple[State, ...]

    def bytes_per(self, per: Literal["token", "sequence"]) -> int:
        """Bytes of one token or sequence in all layers of the group."""
        return len(self.layers) * sum(state.bytes for state in self.states if state.per == per)

    @property
    def window(self) -> int:
        """The most positions that tokens see of the group's states a token; 0: all, or none are
        kept.
        """
        windows = [state.window for state in self.states if state.per == "token"]
        return max(windows, default=0) if all(windows) else 0


class KVLayout(Frozen):
    """What all layers keep between calls, by layer and name of a state.

    States a token are in pages of `block` tokens, which all layers number alike; `capacity_tokens`
    fit. States a sequence are in slots: one for each of `sequences`, and `snapshots` more that hold
    those of prompts as they were at the end of a page, for prompts that begin alike.

    Where `room` is not 0, layers that see a window keep no more than that of a sequence, and what a
    call of up to `room` tokens appends: a ring of pages a sequence, the j-th of which holds those
    of its pages j, j + ring, j + 2 ring, ... that was written last. Such layers have `tail` pages
    for each snapshot.
    """

    block: Annotated[int, Field(ge=1)]
    capacity_tokens: Count
    sequences: Count
    snapshots: Count = 0
    room: Count = 0
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

    def ring(self, group: StateGroup) -> int:
        """Pages that a sequence has in each layer of a group; 0: as many as its length needs."""
        if not (self.room and group.window):
            return 0
        return -(-(group.window - 1 + self.room) // self.block) + 1

    def tail(self, group: StateGroup) -> int:
        """Pages of a ring that tokens after the end of a page see."""
        return -(-(group.window - 1) // self.block) if self.ring(group) else 0

    def ring_of(self, layer: int) -> int:
        """The `ring` of a layer's group."""
        return next((self.ring(group) for group in self.groups if layer in group.layers), 0)

    def rows(self, layer: int, state: State) -> int:
        """How many tokens or slots the tensor of a layer's state has room for."""
        if state.per == "sequence":
            return self.slots
        group = next(group for group in self.groups if layer in group.layers)
        pages = self.blocks
        if ring := self.ring(group):
            pages = self.sequences * ring + self.snapshots * self.tail(group)
        return pages * self.block

    @property
    def bytes_per_token(self) -> int:
        """Bytes over all layers that one token more of a sequence takes."""
        return sum(group.bytes_per("token") for group in self.groups if not self.ring(group))

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes over all layers that a sequence takes whatever its length."""
        return self._kept(self.ring)

    @property
    def bytes_per_snapshot(self) -> int:
        """Bytes over all layers that a snapshot takes."""
        return self._kept(self.tail)

    @property
    def aligned(self) -> int:
        """Calls of a prompt end at multiples of so many tokens, if they are that long."""
        kept = any(group.bytes_per("sequence") for group in self.groups)
        return self.block if kept else 1

    def stops(self, past: int, tokens: int, known: int = 0) -> tuple[Stop, ...]:
        """Where states of a prompt of so many tokens, `past` of which are there, are worth a
        snapshot, ascending, all at ends of pages: the last end that leaves something to compute,
        where the same prompt and the next turn of a conversation go on; the end of the `known`
        tokens that another prompt had as well, where more may leave them; and 8, 16, 32, ... pages
        before the last, so that a prompt that leaves this one d tokens before its end computes some
        2 d at most again.
        """
        last = max(tokens - 1, 0) // self.block
        if not (self.snapshots and self.bytes_per_snapshot):
            return ()
        found, back = {}, SPACING
        while back < last:
            found[last - back] = True
            back *= 2
        found |= {min(known // self.block, last): False, last: False}
        stops = (Stop(page * self.block, sparse) for page, sparse in sorted(found.items()))
        return tuple(stop for stop in stops if stop.tokens > past)

    @property
    def bytes_of_sequences(self) -> int:
        """Bytes of everything that does not grow with tokens."""
        kept = self.snapshots * self.bytes_per_snapshot
        return self.sequences * self.bytes_per_sequence + kept

    def _kept(self, pages: Callable[[StateGroup], int]) -> int:
        return sum(
            group.bytes_per("sequence") + pages(group) * self.block * group.bytes_per("token")
            for group in self.groups
        )


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
