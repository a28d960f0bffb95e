"""The paged KV cache: bf16 tensors in blocks of tokens, and who owns which block; hides free lists
and block tables.

Layouts per layer, as the kernels of codegen/spec.py read them: grouped-query attention has k
[blocks, kv_heads, block, head_dim] and v likewise; latent attention has one tensor [blocks, block,
rank + rope]. All layers share one numbering of blocks, so a sequence has one row of the block
table.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from hmc.errors import CapacityError, ExecutionError
from hmc.plan import KVLayout
from hmc.runtime.memory import LINE, Block, aligned


class BlockAllocator:
    """Blocks 0..count-1, each free or owned once; a block given back twice is an error, lost ones
    show in `used`.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._owned = bytearray(count)

    @property
    def free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks somebody owns; 0 when every sequence has been released."""
        return self.count - len(self._free)

    def take(self, wanted: int) -> list[int]:
        """`wanted` blocks, all or none; `CapacityError` when fewer are free."""
        if wanted > len(self._free):
            raise CapacityError(f"{wanted} cache blocks asked for, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(wanted)]
        for block in blocks:
            self._owned[block] = 1
        return blocks

    def give_back(self, blocks: Iterable[int]) -> None:
        """Free `blocks`; `ExecutionError` when one of them is not owned (nothing is freed then)."""
        blocks = list(blocks)
        wrong = [b for b in blocks if not 0 <= b < self.count or not self._owned[b]]
        if wrong or len(set(blocks)) != len(blocks):
            raise ExecutionError(f"cache blocks {wrong or blocks} are given back but not owned")
        for block in blocks:
            self._owned[block] = 0
            self._free.append(block)


class Sequence:
    """One sequence's place in the cache: `row` of the block table, `length` tokens stored, `blocks`
    it owns.
    """

    def __init__(self, row: int) -> None:
        self.row = row
        self.length = 0
        self.blocks: list[int] = []
        self.open = True


class KVCache:
    """The cache of every layer for up to `sequences` sequences of up to `max_context` tokens each.

    `tables` is i32 [sequences, blocks a sequence can need]; kernels read it in place.
    """

    def __init__(self, layout: KVLayout, sequences: int, max_context: int) -> None:
        self.layout = layout
        self.block = layout.block
        self.allocator = BlockAllocator(-(-layout.capacity_tokens // layout.block))
        self._rows = list(range(sequences - 1, -1, -1))
        self._per_sequence = -(-max_context // layout.block)
        self.tables: npt.NDArray[np.int32] = np.zeros((sequences, self._per_sequence), np.int32)
        tensor_bytes = [
            aligned(2 * width * layout.block * self.allocator.count, LINE)
            for width in layout.widths
        ]
        self._offsets: dict[tuple[int, int], int] = {}
        end = 0
        for layer in layout.layers:
            for part, size in enumerate(tensor_bytes):
                self._offsets[layer, part] = end
                end += size
        self._memory = Block(end, f"KV cache of {self.capacity_tokens} tokens")

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit over all sequences."""
        return self.allocator.count * self.block

    @property
    def bytes(self) -> int:
        """Bytes of address space of the cache."""
        return self._memory.size

    def address(self, layer: int, part: int) -> int:
        """Address of one tensor of a layer: part 0 is k (or the latent), part 1 is v."""
        return self._memory.address + self._offsets[layer, part]

    def tensor(self, layer: int, part: int, heads: int = 1) -> torch.Tensor:
        """bf16 view [blocks, heads, block, dim] of one tensor of a layer (latent: heads = 1)."""
        width = self.layout.widths[part]
        start = self._offsets[layer, part]
        size = 2 * width * self.block * self.allocator.count
        flat = torch.from_numpy(self._memory.array[start : start + size]).view(torch.bfloat16)
        return flat.view(self.allocator.count, heads, self.block, width // heads)

    def open(self) -> Sequence:
        """A new, empty sequence; `CapacityError` when all rows are taken."""
        if not self._rows:
            raise CapacityError(
                f"all {len(self.tables)} sequences of the cache are in use: finish one first"
            )
        return Sequence(self._rows.pop())

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
        if wanted > self.allocator.free:
            raise CapacityError(
                f"KV cache is full: {wanted * self.block} tokens asked for,"
                f" {self.allocator.free * self.block} of {self.capacity_tokens} free;"
                " run fewer sequences at once or compile the plan with a larger --max-context"
            )
        have = len(sequence.blocks)
        sequence.blocks += self.allocator.take(wanted)
        self.tables[sequence.row, have : have + wanted] = sequence.blocks[have:]

    def release(self, sequence: Sequence) -> None:
        """Free the sequence's blocks and row; a second release is an `ExecutionError`."""
        if not sequence.open:
            raise ExecutionError(f"sequence in cache row {sequence.row} is released twice")
        self.allocator.give_back(sequence.blocks)
        self.tables[sequence.row] = 0
        self._rows.append(sequence.row)
        sequence.blocks, sequence.length, sequence.open = [], 0, False

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
