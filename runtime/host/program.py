"""Native programs: kernels and their arguments become the record array that the pool walks; hides
barrier placement.

A caller says which buffers each record reads and writes; the builder puts a barrier before a record
exactly when it touches what an earlier record since the last barrier wrote, or overwrites what one
read. Between barriers workers run ahead of each other, so a record may start while others still are
in earlier ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from hmc.codegen.arguments import ARGS, Kind, pack, word
from hmc.codegen.decode.pieces import TICKET
from hmc.codegen.decode.pieces import flags as share_flags
from hmc.codegen.jit import Kernel
from hmc.codegen.pool import walker

_LINE_BYTES = 8 * TICKET


class Program:
    """Records (`records`, int64 [n, 4], for `Pool.run`), the kernel of each (`kernels`), and the
    argument blocks they point at.

    Argument words may be patched between runs, so a decode step reuses one program. The blocks live
    as long as `records`; the buffers that they name are the caller's to keep.
    """

    def __init__(
        self, kernels: list[Kernel], blocks: list[bytes], meta: np.ndarray, teams: int
    ) -> None:
        # Before each block lines for the record's tickets.
        ahead = teams * _LINE_BYTES
        sizes = [-(-len(block) // _LINE_BYTES) * _LINE_BYTES + ahead for block in blocks]
        table = 8 * walker.RECORD_WORDS * len(kernels)
        offsets = np.cumsum([-(-table // _LINE_BYTES) * _LINE_BYTES + ahead, *sizes])
        raw = np.zeros(int(offsets[-1]) + _LINE_BYTES, np.uint8)
        shift = -raw.ctypes.data % _LINE_BYTES
        memory = raw[shift : shift + int(offsets[-1])]
        for block, offset in zip(blocks, offsets, strict=False):
            memory[offset : offset + len(block)] = np.frombuffer(block, np.uint8)
        self._words = memory.view(np.int64)
        self._first = offsets[:-1] // 8
        self.kernels = tuple(kernels)
        self._fields: dict[tuple[int, int, str], tuple[Kind, np.ndarray]] = {}
        # A view of the memory that holds the blocks too: who keeps the records keeps what they
        # point at.
        self.records = self._words[: table // 8].reshape(-1, walker.RECORD_WORDS)
        self.records[:, 0] = [kernel.address for kernel in kernels]
        self.records[:, 1] = memory.ctypes.data + offsets[:-1]
        self.records[:, 2:] = meta

    def __len__(self) -> int:
        return len(self.kernels)

    def patch_all(self, start: int = 0, stop: int | None = None, /, **fields: int | float) -> None:
        """Set arguments by name in every record of [start, stop) that has them (default: all);
        `ValueError` when none has.

        An argument name must mean the same kind of word throughout these records.
        """
        stop = len(self) if stop is None else stop
        for name, value in fields.items():
            key = (start, stop, name)
            if key not in self._fields:
                self._fields[key] = self._places(*key)
            kind, places = self._fields[key]
            self._words[places] = word(value, kind)

    def _places(self, start: int, stop: int, name: str) -> tuple[Kind, np.ndarray]:
        found = [
            (arg.kind, int(self._first[index]) + place)
            for index in range(start, stop)
            for place, arg in enumerate(ARGS[self.kernels[index].spec.op])
            if arg.name == name
        ]
        kinds = {kind for kind, _ in found}
        if len(kinds) != 1:
            why = "names words of different kinds" if kinds else "is no argument"
            raise ValueError(f"{name} {why} in records {start} to {stop} of this program")
        return kinds.pop(), np.array([place for _, place in found])


class ProgramBuilder:
    """Collects records in the order in which one worker alone would run them, for pools of so many
    `teams` (`Pool.teams`)."""

    def __init__(self, teams: int = 1) -> None:
        self._teams = teams
        self._kernels: list[Kernel] = []
        self._blocks: list[bytes] = []
        self._meta: list[tuple[int, int]] = []
        self._read: set[Hashable] = set()
        self._written: set[Hashable] = set()
        self._gated = False

    def add(
        self,
        kernel: Kernel,
        args: bytes,
        *,
        tag: int,
        reads: Iterable[Hashable] = (),
        writes: Iterable[Hashable] = (),
        pieces: tuple[int, int] = (0, 0),
        alone: bool = False,
    ) -> int:
        """Append a record and return its index. `args` as `spec.pack` makes it; weights need not be
        named. `pieces`: each worker's share is cut in so many, of which it keeps so many for
        itself; who is done first takes of the rest (only for kernels that split by
        `Emitter.split`, and nothing else, and have no scratch for each worker). A record `alone`
        starts when all earlier ones are finished, whatever they read and wrote.

        A record's own share may be read and written by the same worker only, so a buffer named on
        both sides (in place) needs no barrier of its own. Raises `ValueError` when `args` does not
        fit the kernel.
        """
        op = kernel.spec.op
        if len(args) != 8 * len(ARGS[op]):
            raise ValueError(
                f"record {len(self._kernels)}: kernel {op} takes {len(ARGS[op])} argument words,"
                f" not {len(args) / 8:g}"
            )
        read, written = frozenset(reads), frozenset(writes)
        flags = share_flags(*pieces)
        behind = bool((read | written) & self._written or written & self._read)
        if behind or alone or self._gated:
            self._gated = False
            flags |= walker.BARRIER
            self._read.clear()
            self._written.clear()
        self._read |= read
        self._written |= written
        self._kernels.append(kernel)
        self._blocks.append(args)
        self._meta.append((flags, tag))
        return len(self._kernels) - 1

    def await_flag(self, kernel: Kernel, flag: int, abort: int, spin: int, *, tag: int) -> int:
        """Append a record of `flag_wait`: later ones start when the flag at address `flag` has
        reached `epoch`, which is patched before a run. It waits for no earlier record."""
        self._gated = False  # of flags that follow each other the last one's barrier does for all
        args = pack("flag_wait", given_up=0, flag=flag, epoch=0, abort=abort, spin=spin)
        index = self.add(kernel, args, tag=tag)
        self._meta[index] = (self._meta[index][0] | walker.GATE, tag)
        self._gated = True
        return index

    def set_flag(self, kernel: Kernel, flag: int, *, tag: int) -> int:
        """Append a record of `flag_set`: the flag becomes `epoch` when all earlier records are
        finished."""
        return self.add(kernel, pack("flag_set", flag=flag, epoch=0), tag=tag, alone=True)

    def __len__(self) -> int:
        return len(self._kernels)

    def build(self) -> Program:
        """The program so far."""
        meta = np.array(self._meta, np.int64).reshape(-1, 2)
        return Program(list(self._kernels), list(self._blocks), meta, self._teams)
