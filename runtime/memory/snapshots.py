"""Which prompts' sequence states are kept, and in which slots; hides which one goes when another
comes.

A snapshot is what the sequence states were at the end of a page of a prompt, and goes with that
page: whoever shares the pages up to it goes on from the snapshot. There are as many as the plan has
slots for. Sparse ones, which lie on the way through a long prompt, take what is free or another
sparse one's place, so that one prompt does not cost all others theirs; the rest also take that of
the one used longest ago. One that is used is sparse no longer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class Snapshots:
    """Slots by the page at whose end the states in them were taken."""

    def __init__(self, slots: Iterable[int], copy: Callable[[int, int, int], None]) -> None:
        """`copy(from, to, pages)` copies all states of a slot, after so many pages, to another."""
        self._free = list(slots)[::-1]
        self._copy = copy
        self._sparse: OrderedDict[int, int] = OrderedDict()
        self._used: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sparse) + len(self._used)

    def __contains__(self, page: int) -> bool:
        return page in self._sparse or page in self._used

    @property
    def free(self) -> int:
        """Slots that hold nothing and are nobody's."""
        return len(self._free)

    def take(self, *, sparse: bool) -> int | None:
        """A slot for states that are to be kept, the caller's until `put` or `drop`; None: there is
        no room.
        """
        if not self._free:
            for kept in (self._sparse,) if sparse else (self._sparse, self._used):
                if kept:
                    return kept.popitem(last=False)[1]
            return None
        return self._free.pop()

    def put(self, page: int, slot: int, *, sparse: bool) -> None:
        """What a taken slot holds are the states at the end of a page; not needed where these are
        kept already.
        """
        if page in self:
            self.drop(slot)
            if not sparse:
                self._touch(page)
        else:
            (self._sparse if sparse else self._used)[page] = slot

    def drop(self, slot: int) -> None:
        """A taken slot is not needed."""
        self._free.append(slot)

    def keep(self, page: int, row: int, pages: int, *, sparse: bool = False) -> None:
        """Keep the states in slot `row` as those at the end of a page, the sequence's `pages`-th,
        if there is any room and they are not kept already.
        """
        if page in self:
            if not sparse:
                self._touch(page)
        elif (slot := self.take(sparse=sparse)) is not None:
            self._copy(row, slot, pages)
            self.put(page, slot, sparse=sparse)

    def restore(self, page: int, row: int, pages: int) -> None:
        """Put the states kept for a page, which there must be, into slot `row` of a sequence whose
        `pages`-th it is.
        """
        self._copy(self._touch(page), row, pages)

    def forget(self, page: int) -> None:
        """The page is about to hold something else."""
        for kept in (self._sparse, self._used):
            if page in kept:
                self._free.append(kept.pop(page))

    def _touch(self, page: int) -> int:
        """The slot of a page, which is used now."""
        kept = self._sparse if page in self._sparse else self._used
        slot = self._used[page] = kept.pop(page)
        return slot
