"""Which prompts' sequence states are kept, and in which slots; hides which one goes when another
comes.

A snapshot is what the sequence states were at the end of a page of a prompt, and goes with that
page: whoever shares the pages up to it goes on from the snapshot. There are as many as the plan has
slots for; the one used longest ago makes room.
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
        self._slots: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, page: int) -> bool:
        return page in self._slots

    def keep(self, page: int, row: int, pages: int) -> None:
        """Keep the states in slot `row` as those at the end of a page, the sequence's `pages`-th,
        if there is any room and they are not kept already.
        """
        if page in self._slots:
            self._slots.move_to_end(page)
            return
        if not self._free:
            if not self._slots:
                return
            self._free.append(self._slots.popitem(last=False)[1])
        slot = self._free.pop()
        self._copy(row, slot, pages)
        self._slots[page] = slot

    def restore(self, page: int, row: int, pages: int) -> None:
        """Put the states kept for a page, which there must be, into slot `row` of a sequence whose
        `pages`-th it is.
        """
        self._copy(self._slots[page], row, pages)
        self._slots.move_to_end(page)

    def forget(self, page: int) -> None:
        """The page is about to hold something else."""
        if page in self._slots:
            self._free.append(self._slots.pop(page))
