"""Which cache block holds which prompt tokens behind which others; hides the chain of keys.

A block's content depends on all tokens before it, so a block is known by the block before it and
by its own tokens. Both are compared exactly: no hash can mistake one prompt for another. The block
number serves as the key of what follows it, which is sound because whoever owns a block owns all
blocks before it too, and blocks nobody owns are forgotten from the end of a chain on (see
`BlockAllocator`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROOT = -1

Ids = npt.NDArray[np.int32]


class PrefixIndex:
    """Blocks of `block` tokens by their content."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._blocks: dict[tuple[int, bytes], int] = {}
        self._contents: dict[int, tuple[int, bytes]] = {}

    def match(self, ids: Ids, most: int) -> list[int]:
        """The known blocks, at most `most`, that hold the beginning of `ids` i32 [tokens]."""
        found: list[int] = []
        before = _ROOT
        for index in range(min(most, len(ids) // self._block)):
            block = self._blocks.get((before, self._tokens(ids, index)))
            if block is None:
                break
            found.append(block)
            before = block
        return found

    def add(self, blocks: list[int], index: int, ids: Ids) -> bool:
        """Learn that `blocks[index]` holds its part of `ids`, whose earlier blocks are known.

        False, and nothing learnt, when another block is known for the same tokens.
        """
        before = blocks[index - 1] if index else _ROOT
        content = before, self._tokens(ids, index)
        if self._blocks.setdefault(content, blocks[index]) != blocks[index]:
            return False
        self._contents[blocks[index]] = content
        return True

    def forget(self, block: int) -> None:
        """The block is about to hold something else."""
        del self._blocks[self._contents.pop(block)]

    def _tokens(self, ids: Ids, index: int) -> bytes:
        return ids[index * self._block : (index + 1) * self._block].tobytes()
