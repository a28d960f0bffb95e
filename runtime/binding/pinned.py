"""Pins the weights that GPUs stream where they are: which ranges, and what is said of them.

An arena is pinned whole. Of other memory (mapped shards, private blocks) the pages that loads copy
from are pinned: weights that stay on the CPU need not be.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import ExitStack

from hmc.runtime.binding.weights import Piece
from hmc.runtime.devices.pinned import pin, unpin
from hmc.runtime.weights.store import WeightStore


def pin_weights(store: WeightStore, streamed: Iterable[Piece], stack: ExitStack) -> str:
    """Pin what holds the pieces `streamed` until `stack` is closed; says what was pinned, in one
    line ("" where nothing is streamed)."""
    pages = whole_pages((piece.address, piece.nbytes) for piece in streamed)
    if not pages:
        return ""
    read_only = store.home == "mapped"
    if store.arena is not None:
        pages = [(store.arena.address, store.arena.size)]
        read_only = not store.arena.array.flags.writeable  # attached, not made here
    for address, nbytes in pages:
        pin(address, nbytes, read_only=read_only)
        stack.callback(unpin, address)
    total = sum(nbytes for _, nbytes in pages) / 2**30
    kind = "shared" if store.arena is not None else store.home
    ranges = "1 range" if len(pages) == 1 else f"{len(pages)} ranges"
    return f"{total:.2f} GiB of {kind} weights are pinned for the GPUs, in {ranges}"


def whole_pages(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Address and bytes of the pages that `ranges` touch, those side by side as one range."""
    merged: list[tuple[int, int]] = []
    for address, nbytes in sorted(ranges):
        first = address // mmap.PAGESIZE * mmap.PAGESIZE
        last = -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return [(first, last - first) for first, last in merged]
