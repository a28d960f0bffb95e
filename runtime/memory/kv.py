"""What sequences keep between calls: states a token in pages (the paged KV cache), states a
sequence in slots, and who owns which; hides free lists, page tables and what is kept of prompts
that may come again.

A layer has a tensor for each of its states, as kernels read them (codegen/arguments.py). In pages:
keys and values [blocks, kv_heads, block, head_dim], latents [blocks, block, rank + rope]; all
layers share one numbering of blocks, so a sequence has one row of the page table. But where the
layout has rings for layers that see a window, these have tables of their own, which never change: a
sequence has the ring numbered as its row. In slots: [slots, width], of which a sequence has the one
that is numbered as its row, all zeros when it is opened. Devices that keep states of their own
(`attach`) follow.

Prefix reuse: full blocks of prompt tokens can be kept when their sequence is released, and a new
sequence whose prompt begins with the same tokens shares them, read-only. Only what a *prefill*
wrote is kept for everybody: a decode step computes the same values by other kernels, whose rounding
may differ, and an answer must not depend on whether its prompt was an answer before. What decode
steps wrote of a sequence that has to make room can be kept for itself alone. Where layers keep
states a sequence or rings, blocks are shared up to one for whose end there is a snapshot of them
(snapshots.py), which are taken where the layout says (`KVLayout.stops`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hmc.errors import CapacityError, ExecutionError
from hmc.plan import KVLayout, StateGroup, Stop
from hmc.runtime.memory.allocator import BlockAllocator
from hmc.runtime.memory.blocks import LINE, Block, aligned
from hmc.runtime.memory.prefix import EVERYBODY, PrefixIndex
from hmc.runtime.memory.snapshots import Snapshots

_TYPES: dict[str, type[np.generic]] = {"f32": np.float32, "bf16": np.uint16}


class Follower(Protocol):
    """Slots of states a sequence that a device has beside those here."""

    def clear(self, slot: int) -> None:
        """Zero all states of a slot."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy all states of a slot to another."""
        ...


class Sequence:
    """One sequence's place in the cache: `row` of the block table, `length` tokens stored, `blocks`
    it owns or shares.

    `indexed` leading blocks can be found by others; `alone`: others hold the same prompt in other
    blocks, so no more of them will be. `stops` are where snapshots of its states are wanted while
    its prompt is computed, `lent` the slots that who computes it in another process puts them into.
    """

    def __init__(self, row: int) -> None:
        self.row = row
        self.length = 0
        self.blocks: list[int] = []
        self.open = True
        self.indexed = 0
        self.alone = False
        self.stops: tuple[Stop, ...] = ()
        self.lent: dict[Stop, int] | None = None


class KVCache:
    """The states of every layer for as many sequences as the layout says, of up to `max_context`
    tokens each.

    `tables` is i32 [sequences, blocks a sequence can need]; kernels read it, or the `table` of
    their layer, in place.
    """

    def __init__(self, layout: KVLayout, max_context: int, memory: Block | None = None) -> None:
        """In `memory` of at least `cache_bytes(layout)`, owned from now on, else in a block of its
        own.
        """
        self.layout = layout
        self.block = layout.block
        self._prefixes = PrefixIndex(layout.block)
        self.allocator = BlockAllocator(layout.blocks, self._forget)
        self._rows = list(range(layout.sequences - 1, -1, -1))
        self._per_sequence = -(-max_context // layout.block)
        shape = (layout.sequences, self._per_sequence)
        self.tables: npt.NDArray[np.int32] = np.zeros(shape, np.int32)
        row, page = np.indices(shape, np.int32)
        self._rings = {
            ring: row * np.int32(ring) + page % np.int32(ring)
            for ring in {layout.ring(group) for group in layout.groups} - {0}
        }
        self._offsets, end = _places(layout)
        self._memory = memory or Block(end, f"KV cache of {self.capacity_tokens} tokens")
        if self._memory.size < end:
            raise ExecutionError(f"a KV cache of {end:,} bytes in {self._memory.size:,}")
        self.snapshots = Snapshots(range(layout.sequences, layout.slots), self._copy)
        self._slots = [
            self.array(layer, state.name)
            for layer, state in layout.each()
            if state.per == "sequence"
        ]
        self._followers: list[Follower] = []

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit over all sequences."""
        return self.allocator.count * self.block

    def address(self, layer: int, state: str) -> int:
        """Address of the tensor of a layer's state."""
        return self._memory.address + self._offsets[layer, state]

    def array(self, layer: int, state: str, heads: int = 1) -> npt.NDArray[Any]:
        """View of the tensor of a layer's state, f32 or the bits of bf16 (u16): [blocks, heads,
        block, dim] in pages, or [slots, width].
        """
        found, start = self.layout.state(layer, state), self._offsets[layer, state]
        size = self.layout.rows(layer, found) * found.bytes
        flat = self._memory.array[start : start + size].view(_TYPES[found.dtype])
        if found.per == "sequence":
            return flat.reshape(self.layout.slots, found.width)
        return flat.reshape(-1, heads, self.block, found.width // heads)

    def table(self, layer: int) -> npt.NDArray[np.int32]:
        """The page table of a layer, shaped as `tables`, which it is but where the layer has rings;
        it stays where it is.
        """
        return self._rings.get(self.layout.ring_of(layer), self.tables)

    def spread(self, nodes: Collection[int]) -> str:
        """Have pages that nobody has touched come from several NUMA nodes by turns, since workers
        of all of them read every sequence; what is to be said of it."""
        return self._memory.spread(nodes)

    def attach(self, follower: Follower) -> None:
        """Have a device's slots follow what happens to sequences."""
        self._followers.append(follower)

    def detach(self, follower: Follower) -> None:
        """Let go of a device's slots."""
        if follower in self._followers:
            self._followers.remove(follower)

    def open(self) -> Sequence:
        """A new, empty sequence; `CapacityError` when all rows are taken."""
        if not self._rows:
            raise CapacityError(
                f"all {len(self.tables)} sequences of the cache are in use: finish one first"
            )
        row = self._rows.pop()
        for slots in self._slots:
            slots[row] = 0
        for follower in self._followers:
            follower.clear(row)
        return Sequence(row)

    @property
    def rows_free(self) -> int:
        """Sequences that can still be opened."""
        return len(self._rows)

    def adopt(
        self,
        sequence: Sequence,
        ids: npt.NDArray[np.int32],
        prompt: int = 0,
        owner: int = EVERYBODY,
    ) -> int:
        """Let an empty sequence share the kept blocks that hold the beginning of `ids` i32
        [tokens]; how many tokens that is. `ids` are a prompt, or begin with one of `prompt` tokens
        and go on with what the `owner` was answered.

        At least one token is left to be computed: its logits are wanted.
        """
        if sequence.blocks or sequence.length:
            raise ExecutionError(f"sequence in cache row {sequence.row} is not empty")
        shared = (prompt or len(ids)) // self.block
        blocks = self._prefixes.match(ids, (len(ids) - 1) // self.block, shared, owner)
        if self.layout.bytes_per_sequence:
            known = min(len(blocks), shared) * self.block
            while blocks and blocks[-1] not in self.snapshots:
                blocks.pop()
            if blocks:
                self.snapshots.restore(blocks[-1], sequence.row, len(blocks))
            past = len(blocks) * self.block
            sequence.stops = self.layout.stops(past, prompt or len(ids), known)
        self.allocator.share(blocks)
        sequence.blocks = blocks
        sequence.length = len(blocks) * self.block
        sequence.indexed = len(blocks)
        self.tables[sequence.row, : len(blocks)] = blocks
        return sequence.length

    def keep(self, sequence: Sequence, ids: npt.NDArray[np.int32]) -> None:
        """Keep the full blocks of `sequence`, all of whose tokens are the prompt `ids` as far as
        they are stored and were written by a prefill; and its states where it has a stop.
        """
        full = min(sequence.length, len(ids)) // self.block
        while sequence.indexed < full and not sequence.alone:
            self._index(sequence, ids)
        if sequence.lent is not None:
            self._put_lent(sequence, ids)
            return
        self._keep_states(sequence, self._page(ids, full))

    def lend(self, sequence: Sequence) -> None:
        """From now on another process computes a sequence's prompt: it has slots for the snapshots
        at its stops, and its states are no longer those of `sequence.length` tokens.
        """
        if sequence.lent is None:
            sequence.lent = {}
            for stop in reversed(sequence.stops):
                if (slot := self.snapshots.take(sparse=stop.sparse)) is not None:
                    sequence.lent[stop] = slot

    def settle(self, sequence: Sequence) -> None:
        """The other process writes nothing more."""
        for slot in (sequence.lent or {}).values():
            self.snapshots.drop(slot)
        sequence.lent = None

    def copy(self, row: int, slot: int, tokens: int) -> None:
        """Copy the states of a sequence in `row`, after so many tokens, to the slot of a
        snapshot.
        """
        self._copy(row, slot, tokens // self.block)

    def keep_own(
        self, sequence: Sequence, ids: npt.NDArray[np.int32], prompt: int, owner: int
    ) -> None:
        """Keep the full blocks that follow those of a sequence's prompt, the first `prompt` tokens
        of `ids`, for its `owner` alone, and its states where it has a stop; where all blocks of the
        prompt are kept.
        """
        full, shared = min(sequence.length, len(ids)) // self.block, prompt // self.block
        while shared <= sequence.indexed < full and not sequence.alone:
            self._index(sequence, ids, owner)
        self._keep_states(sequence, self._page(ids, full, shared, owner))

    def spare(self, sequence: Sequence, tokens: int) -> int:
        """How many blocks can still be taken when there is room for `tokens` more tokens of a
        sequence; negative where there is none.
        """
        wanted = -(-(sequence.length + tokens) // self.block) - len(sequence.blocks)
        return self.allocator.available - max(0, wanted)

    def reserve(self, sequence: Sequence, tokens: int) -> None:
        """Make room for `tokens` more tokens after `sequence.length`.

        Raises `CapacityError` (asked, free, capacity, remedy) and changes nothing when the cache is
        full.
        """
        total = sequence.length + tokens
        wanted = -(-total // self.block) - len(sequence.blocks)
        if wanted <= 0:
            return
        if len(sequence.blocks) + wanted > self._per_sequence:
            raise CapacityError(
                f"a sequence of {total} tokens exceeds the {self._per_sequence * self.block} a row"
                " of the KV cache holds: compile the plan with a larger --max-context"
            )
        if wanted > self.allocator.available:
            raise CapacityError(
                f"KV cache is full: {wanted * self.block} tokens asked for,"
                f" {self.allocator.available * self.block} of {self.capacity_tokens} free;"
                " run fewer sequences at once or compile the plan with a larger --max-context"
            )
        have = len(sequence.blocks)
        sequence.blocks += self.allocator.take(wanted)
        self.tables[sequence.row, have : have + wanted] = sequence.blocks[have:]

    def release(self, sequence: Sequence) -> None:
        """Free the sequence's blocks and row; a second release is an `ExecutionError`."""
        if not sequence.open:
            raise ExecutionError(f"sequence in cache row {sequence.row} is released twice")
        self.settle(sequence)
        # From the end: a block is never taken before those that follow it.
        self.allocator.give_back(reversed(sequence.blocks))
        self.tables[sequence.row] = 0
        self._rows.append(sequence.row)
        sequence.blocks, sequence.length, sequence.open = [], 0, False

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()

    def _index(
        self, sequence: Sequence, ids: npt.NDArray[np.int32], owner: int = EVERYBODY
    ) -> None:
        """Keep the first block of a sequence that is not kept yet."""
        block = sequence.blocks[sequence.indexed]
        if self._prefixes.add(sequence.blocks, sequence.indexed, ids, owner):
            self.allocator.keep(block)
            sequence.indexed += 1
        else:
            sequence.alone = True

    def _page(
        self, ids: npt.NDArray[np.int32], pages: int, shared: int = 0, owner: int = EVERYBODY
    ) -> int | None:
        """The known block that holds the last of the first `pages` of a prompt, the prompt's own or
        one that holds the same; of those after the `shared` ones one of the `owner`'s.
        """
        known = self._prefixes.match(ids, pages, shared, owner)
        return known[-1] if known and len(known) == pages else None

    def _keep_states(self, sequence: Sequence, page: int | None) -> None:
        """Keep a sequence's states for a block, which holds its last tokens, where it has a
        stop.
        """
        for stop in sequence.stops:
            if page is not None and stop.tokens == sequence.length:
                pages = stop.tokens // self.block
                self.snapshots.keep(page, sequence.row, pages, sparse=stop.sparse)

    def _put_lent(self, sequence: Sequence, ids: npt.NDArray[np.int32]) -> None:
        """Keep what another process has put into the slots lent to it."""
        assert sequence.lent is not None
        for stop in [stop for stop in sequence.lent if stop.tokens <= sequence.length]:
            slot, page = sequence.lent.pop(stop), self._page(ids, stop.tokens // self.block)
            if page is None:
                self.snapshots.drop(slot)
            else:
                self.snapshots.put(page, slot, sparse=stop.sparse)

    def _forget(self, block: int) -> None:
        self._prefixes.forget(block)
        self.snapshots.forget(block)

    def _ring(
        self, group: StateGroup, slot: int, pages: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Where some of a sequence's pages are in the tensors of a group, in its ring or in a
        snapshot.
        """
        ring, tail, rings = self.layout.ring(group), self.layout.tail(group), len(self.tables)
        if slot < rings:
            return slot * ring + pages % ring
        return rings * ring + (slot - rings) * tail + pages % tail

    def _copy(self, source: int, target: int, pages: int) -> None:
        """Copy the states a sequence of one slot, after so many pages, to another; of rings the
        pages that tokens from there on see.
        """
        for group in self.layout.groups:
            if tail := self.layout.tail(group):
                behind = np.arange(max(0, pages - tail), pages)
                came, goes = (self._ring(group, slot, behind) for slot in (source, target))
                for layer in group.layers:
                    for state in group.states:
                        if state.per == "token":
                            held = self.array(layer, state.name)
                            held[goes] = held[came]
        for slots in self._slots:
            slots[target] = slots[source]
        for follower in self._followers:
            follower.copy(source, target)


def cache_bytes(layout: KVLayout) -> int:
    """Bytes of memory of a `KVCache`."""
    return _places(layout)[1]


def _places(layout: KVLayout) -> tuple[dict[tuple[int, str], int], int]:
    """Where the tensor of each layer's state begins, and where the last one ends."""
    offsets, end = {}, 0
    for layer, state in layout.each():
        offsets[layer, state.name] = end
        end += aligned(layout.rows(layer, state) * state.bytes, LINE)
    return offsets, end
