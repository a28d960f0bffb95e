"""Flags: words in host memory by which native CPU programs and device streams wait for each other
without Python between them.

A flag holds the number of the latest call (*epoch*, modulo 2^32) in which what it stands for has
happened; a new call is a new epoch, and nothing is reset. Each flag has a cache line of its own,
since CPU cores and GPUs write them in turn. One more word says that the call was given up.
"""

from __future__ import annotations

import torch

_LINE_WORDS = 16
_MODULUS = 1 << 32


class Flags:
    """`count` flags, numbered from 0. The memory lives as long as this object; who hands its
    addresses on keeps it.
    """

    def __init__(self, count: int, memory: torch.Tensor | None = None) -> None:
        """`memory`, u8 [Flags.bytes(count)], aligned to a line: where they are to lie."""
        size = self.bytes(count)
        self._memory = torch.empty(size, dtype=torch.uint8) if memory is None else memory
        words = self._memory[:size].zero_().numpy().view("u4")
        self._words = words.reshape(count + 1, _LINE_WORDS)[:, 0]
        self.count = count
        self.epoch = 0

    @staticmethod
    def bytes(count: int) -> int:
        """Memory that so many flags take."""
        return 4 * _LINE_WORDS * (count + 1)

    def address(self, number: int) -> int:
        """Byte address of a flag: a 32-bit word."""
        return int(self._words[number : number + 1].ctypes.data)

    @property
    def abort_address(self) -> int:
        """Byte address of the word that is not 0 once a call was given up."""
        return self.address(self.count)

    def advance(self) -> None:
        """Begin a call: its epoch is the next one. Nobody may be waiting."""
        self.epoch = (self.epoch + 1) % _MODULUS

    def set(self, number: int, epoch: int) -> None:
        """Let a flag's event have happened in a call."""
        self._words[number] = epoch

    def reached(self, number: int, epoch: int) -> bool:
        """Whether a flag's event has happened in a call or a later one."""
        return (int(self._words[number]) - epoch) % _MODULUS < _MODULUS // 2

    def abort(self) -> None:
        """Let nobody wait any longer, for good: native programs end where they wait; streams go
        on, with results that nobody is to use. In this order: see codegen/pool/flags.py.
        """
        self._words[self.count] = 1
        self._words[: self.count] = self.epoch
