"""Which cache block holds which tokens behind which others; hides the chain of keys.

A block's content depends on all tokens before it, so a block is known by the block before it and
by its own tokens. Both are compared exactly: no hash can mistake one prompt for another. The block
number serves as the key of what follows it, which is sound because whoever owns a block owns all
blocks before it too, and blocks nobody owns are forgotten from the end of a chain on (see
`BlockAllocator`).

Blocks of prompts, which a prefill wrote, are everybody's. Those that decode steps wrote may differ
in rounding from what a prefill would have: each has an owner, who alone finds it again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROOT = -1
EVERYBODY = -1
"""The owner of what a prefill wrote."""

Ids = npt.NDArray[np.int32]


class PrefixIndex:
    """Blocks of `block` tokens by their content."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._blocks: dict[tuple[int, bytes, int], int] = {}
        self._contents: dict[int, tuple[int, bytes, int]] = {}

    def match(self, ids: Ids, most: int, prompt: int = 0, owner: int = EVERYBODY) -> list[int]:
        """The known blocks, at most `most`, that hold the beginning of `ids` i32 [tokens]; of those
        after the first `prompt` blocks the ones that are the `owner`'s.
        """
        found: list[int] = []
        before = _ROOT
        for index in range(min(most, len(ids) // self._block)):
            whose = EVERYBODY if index < prompt else owner
            block = self._blocks.get((before, self._tokens(ids, index), whose))
            if block is None:
                break
            found.append(block)
            before = block
        return found

    def add(self, blocks: list[int], index: int, ids: Ids, owner: int = EVERYBODY) -> bool:
        """Learn that `blocks[index]` holds its part of `ids`, whose earlier blocks are known.

        False, and nothing learnt, when another block is known for the same tokens.
        """
        before = blocks[index - 1] if index else _ROOT
        content = before, self._tokens(ids, index), owner
        if self._blocks.setdefault(content, blocks[index]) != blocks[index]:
            return False
        self._contents[blocks[index]] = content
        return True

    def forget(self, block: int) -> None:
        """The block is about to hold something else."""
        del self._blocks[self._contents.pop(block)]

    def _tokens(self, ids: Ids, index: int) -> bytes:
        return ids[index * self._block : (index + 1) * self._block].tobytes()
