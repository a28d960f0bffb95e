"""Who owns which blocks of the paged cache; hides free lists and which cached block is taken when
free ones run out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from hmc.errors import CapacityError, ExecutionError


class BlockAllocator:
    """Blocks 0..count-1, each free, used (owned once or shared) or cached (kept, with no owner).

    Cached blocks are taken when free ones run out, the one given back longest ago first. A block
    given back too often is an error, lost ones show in `used`.
    """

    def __init__(self, count: int, forget: Callable[[int], None] | None = None) -> None:
        """`forget` is called with each cached block that is about to be taken for something new."""
        self.count = count
        self._forget = forget
        self._free = list(range(count - 1, -1, -1))
        self._owners = [0] * count
        self._keep = bytearray(count)
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def cached(self) -> int:
        """Blocks that nobody owns and that still hold something worth keeping."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `take` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks somebody owns; 0 when every sequence has been released."""
        return self.count - self.available

    def take(self, wanted: int) -> list[int]:
        """`wanted` blocks, all or none; `CapacityError` when fewer are available."""
        if wanted > self.available:
            raise CapacityError(f"{wanted} cache blocks asked for, {self.available} free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(wanted)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each of `blocks`; `ExecutionError` when one of them is free."""
        blocks = list(blocks)
        if free := [b for b in blocks if not (self._owners[b] or b in self._cached)]:
            raise ExecutionError(f"cache blocks {free} are shared but free")
        for block in blocks:
            self._cached.pop(block, None)
            self._owners[block] += 1

    def keep(self, block: int) -> None:
        """Cache the block when its last owner gives it back; `ExecutionError` when it has none."""
        if not self._owners[block]:
            raise ExecutionError(f"cache block {block} is kept but not owned")
        self._keep[block] = 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """One owner fewer for each of `blocks`, in this order: of those cached now, the first will
        be taken first. `ExecutionError` when one of them is not owned (nothing changes then).
        """
        blocks = list(blocks)
        wrong = [b for b in blocks if not 0 <= b < self.count or not self._owners[b]]
        if wrong or len(set(blocks)) != len(blocks):
            raise ExecutionError(f"cache blocks {wrong or blocks} are given back but not owned")
        for block in blocks:
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if self._keep[block]:
                self._cached[block] = None
            else:
                self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._keep[block] = 0
        if self._forget is not None:
            self._forget(block)
        return block
