"""The memory one phase computes in: activation buffers, external arrays, workspaces; hides
addresses and hazards.

A buffer of the plan has `offset` bytes *a token*; in memory it takes `[offset * max_tokens, (offset
+ bytes) * max_tokens)` of one block, rows one buffer width apart. So buffers that the plan keeps
apart stay apart whatever the number of tokens. External arrays (ids, positions, rows, logits)
belong to the arena too; the executor fills and reads them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.machine.topology import Team
from hmc.plan import DTYPE_BYTES, Buffer, Operand, Phase
from hmc.runtime.memory.blocks import Block

Names = frozenset[Hashable]
Ints = npt.NDArray[np.int32]

_NUMPY = {"f32": np.float32, "bf16": np.uint16, "i32": np.int32}


class Arena:
    """All memory of a phase but weights and cache.

    Arrays beside the plan's: `sequence` i32 [max_tokens], each token's block table row; `order` i32
    [max_tokens], 0, 1, 2, ...; `span` i32 [2], 0 and the number of tokens of the run.
    """

    def __init__(self, phase: Phase, teams: Sequence[Team] = ()) -> None:
        """Activations, which workers of all `teams` read, are spread over their NUMA nodes; of
        scratch every worker touches its own part first."""
        self.max_tokens = phase.max_tokens
        self._buffers = {buffer.name: buffer for buffer in phase.buffers}
        self._block = Block(phase.activation_bytes * phase.max_tokens, f"{phase.name} activations")
        self._block.spread({team.memory for team in teams})
        self._external = {
            buffer.name: Block(
                buffer.width * DTYPE_BYTES[buffer.dtype] * phase.max_tokens, buffer.name
            )
            for buffer in phase.buffers
            if buffer.offset < 0
        }
        self._workspaces: dict[tuple[str, int], Block] = {}
        self.sequence: npt.NDArray[np.int32] = np.zeros(phase.max_tokens, np.int32)
        self.order: npt.NDArray[np.int32] = np.arange(phase.max_tokens, dtype=np.int32)
        self.span: npt.NDArray[np.int32] = np.zeros(2, np.int32)
        self._pieces = _pieces(phase)
        self._sharing = _sharing(phase)

    def address(self, operand: Operand) -> int:
        """Byte address of the operand's first element."""
        buffer = self._buffers[operand.buffer]
        return self._base(buffer) + operand.column * DTYPE_BYTES[buffer.dtype]

    def stride(self, operand: Operand) -> int:
        """Elements from one row to the next."""
        return self._buffers[operand.buffer].width

    def packed(self, operand: Operand) -> bool:
        """Whether rows follow each other without a gap, as kernels without a stride need it."""
        return operand.width == self.stride(operand)

    def inputs(self, name: str) -> npt.NDArray[np.int32]:
        """The external array "ids", "positions" or "rows": i32 [max_tokens], to be written."""
        return self._external[name].array.view(np.int32)

    def enter(self, ids: Ints, positions: Ints, tables: Ints) -> None:
        """Put the tokens of a run, i32 [tokens] each, where records find them; `tables` are their
        block table rows."""
        tokens = len(ids)
        self.inputs("ids")[:tokens] = ids
        self.inputs("positions")[:tokens] = positions
        self.sequence[:tokens] = tables
        self.span[1] = tokens

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The external output f32 [max_tokens, vocab]."""
        return self._external["logits"].array.view(np.float32).reshape(self.max_tokens, -1)

    def array(self, operand: Operand, tokens: int) -> npt.NDArray[Any]:
        """The operand's first `tokens` rows, [tokens, width], of bf16 the bits (u16); a view."""
        buffer = self._buffers[operand.buffer]
        block, start = self._block, buffer.offset * self.max_tokens
        if buffer.offset < 0:
            block, start = self._external[buffer.name], 0
        size = buffer.width * DTYPE_BYTES[buffer.dtype] * self.max_tokens
        whole = block.array[start : start + size].view(_NUMPY[buffer.dtype])
        columns = slice(operand.column, operand.column + operand.width)
        return whole.reshape(self.max_tokens, buffer.width)[:tokens, columns]

    def workspace(self, name: str, size: int) -> int:
        """Address of `size` bytes that all steps asking for the same name and size share."""
        if (name, size) not in self._workspaces:
            self._workspaces[name, size] = Block(size, name)
        return self._workspaces[name, size].address

    def touched(self, operand: Operand) -> Names:
        """Names of the pieces of memory that reading the operand touches."""
        pieces = self._pieces[operand.buffer]
        end = operand.column + operand.width
        return frozenset(
            (operand.buffer, start)
            for start, stop in pieces
            if start < end and operand.column < stop
        )

    def overwritten(self, operand: Operand) -> Names:
        """Names that writing it touches: its own, and all of every buffer that lives in the same
        bytes.
        """
        shared = (
            (other, start)
            for other in self._sharing[operand.buffer]
            for start, _ in self._pieces[other]
        )
        return self.touched(operand) | frozenset(shared)

    def close(self) -> None:
        """Give the memory back."""
        for block in (self._block, *self._external.values(), *self._workspaces.values()):
            block.close()

    def _base(self, buffer: Buffer) -> int:
        if buffer.offset < 0:
            return self._external[buffer.name].address
        return self._block.address + buffer.offset * self.max_tokens


def _pieces(phase: Phase) -> dict[str, list[tuple[int, int]]]:
    """Every buffer cut at all columns where some operand starts or ends: (start, stop) of each
    piece.
    """
    cuts: dict[str, set[int]] = {buffer.name: {0, buffer.width} for buffer in phase.buffers}
    for step in phase.steps:
        for operand in (*step.inputs.values(), *step.outputs.values()):
            cuts[operand.buffer] |= {operand.column, operand.column + operand.width}
    return {name: list(pairwise(sorted(columns))) for name, columns in cuts.items()}


def _sharing(phase: Phase) -> dict[str, list[str]]:
    """For every buffer the others whose bytes overlap its own."""
    result: dict[str, list[str]] = defaultdict(list)
    active: list[tuple[int, Buffer]] = []
    inside = [buffer for buffer in phase.buffers if buffer.offset >= 0]
    for buffer in sorted(inside, key=lambda buffer: buffer.offset):
        active = [(stop, other) for stop, other in active if stop > buffer.offset]
        for _, other in active:
            result[buffer.name].append(other.name)
            result[other.name].append(buffer.name)
        active.append((buffer.offset + buffer.width * DTYPE_BYTES[buffer.dtype], buffer))
    return result
