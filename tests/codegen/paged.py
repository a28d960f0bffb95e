"""A paged cache with random rows for the attention tests; what no token may look at is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from kernel_calls import bf16, from_bf16, guarded

NAN = 0x7FC0


@dataclass
class Paged:
    """Block tables [sequences, stride] and tokens (`sequence`, `positions`) over `blocks` shuffled
    blocks.
    """

    block: int
    blocks: int
    tables: np.ndarray
    sequence: np.ndarray
    positions: np.ndarray

    @staticmethod
    def of(rng: np.random.Generator, block: int, tokens: list[tuple[int, int]]) -> Paged:
        """`tokens`: (sequence, position) of each. Tables are one entry longer than needed, and that
        one is wild.
        """
        sequences = max(s for s, _ in tokens) + 1
        length = max(p for _, p in tokens) // block + 1
        numbers = rng.permutation(sequences * length).astype(np.int32).reshape(sequences, length)
        tables = np.pad(numbers, ((0, 0), (0, 1)), constant_values=2**30)
        sequence, positions = (guarded(np.array(c, np.int32)) for c in zip(*tokens, strict=True))
        return Paged(block, sequences * length, guarded(tables), sequence, positions)

    @property
    def max_context(self) -> int:
        """Positions of the longest sequence."""
        return int(self.positions.max()) + 1

    def place(self, token: int) -> tuple[int, int]:
        """Block and slot of a token's own position."""
        position = self.positions[token]
        return self.tables[self.sequence[token], position // self.block], position % self.block

    def rows(self, rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        """bf16 rows [blocks, block, *shape] (bits and f64): NaN at positions that no token attends
        to.
        """
        bits = bf16(rng.standard_normal((self.blocks, self.block, *shape)))
        for s in range(len(self.tables)):
            seen = self.positions[self.sequence == s]
            for position in range(
                seen.max(initial=-1) + 1, (self.tables.shape[1] - 1) * self.block
            ):
                bits[self.tables[s, position // self.block], position % self.block] = NAN
        return bits, from_bf16(bits)

    def only(self, token: int) -> Paged:
        """The same cache with one token."""
        return Paged(
            self.block, self.blocks, self.tables,
            guarded(self.sequence[token : token + 1]), guarded(self.positions[token : token + 1]),
        )  # fmt: skip
