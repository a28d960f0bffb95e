"""How kernels of attention divide heads, keys and queries: by sizes of heads and by architecture,
so that nothing is spilled and shared memory holds what is under way.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.codegen.triton.table import SHARED

LEAST = 16
"""Fewest rows, columns or terms of a tensor core's product."""


def power(number: int, least: int = 1) -> int:
    """The least power of two that is no smaller than `number` and `least`."""
    return max(least, 1 << (number - 1).bit_length())


@dataclass(frozen=True)
class Head:
    """A head's columns as kernels read them: the first `cut` of a key's padded to `main`, the rest
    to `rest` (LEAST where there is none), and those of a value to `wide`, powers of two. Values
    that are `shared` are the first `cut` columns of keys; the last `apart` lie elsewhere.
    """

    head_dim: int
    v_dim: int
    shared: bool = False
    apart: int = 0

    @property
    def cut(self) -> int:
        """A power of two where two pieces are narrower than one, else all columns."""
        if self.shared:
            return self.v_dim
        if self.apart:
            return self.head_dim - self.apart
        high = power(self.head_dim) // 2
        two = high + power(self.head_dim - high, LEAST)
        return high if high >= LEAST and two < power(self.head_dim) else self.head_dim

    @property
    def main(self) -> int:
        """Columns of the first piece."""
        return power(self.cut, LEAST)

    @property
    def rest(self) -> int:
        """Columns of the second."""
        return power(max(1, self.head_dim - self.cut), LEAST)

    @property
    def wide(self) -> int:
        """Columns of a value."""
        return power(self.v_dim, LEAST)

    @property
    def constants(self) -> dict[str, int]:
        """As kernels take them."""
        return {"HEAD_DIM": self.head_dim, "V_DIM": self.v_dim, "CUT": self.cut,
                "MAIN": self.main, "REST": self.rest, "WIDE": self.wide}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """What a program works on at once: `rows` heads or queries, and `keys`, by `warps` of 32
    threads with `stages` steps of loads under way."""

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def few(head: Head, group: int, arch: int) -> Tile:
    """Of `attend`, for key heads with a group of heads each: the more heads, the fewer times keys
    are read, though but once from memory."""
    columns = head.main + (0 if head.shared else head.wide)
    if columns <= 256:
        return Tile(16, 64, 4, 3)
    rows = 16 if group <= 16 or not head.shared else 32
    if SHARED[arch] < 128:
        return Tile(rows, 32, 8, 3)
    return Tile(rows, 32 if SHARED[arch] < 192 else 64, 8, 4)


def unrolled(tile: Tile, head: Head) -> int:
    """How many parts of sums `attend` loads at once where it joins them: some 64 registers."""
    return max(1, min(4, 64 * 32 * tile.warps // (tile.rows * head.wide)))


def many(head: Head, arch: int, plain: bool) -> Tile:
    """Of `attend_prompt`, `plain` where there are neither bounds nor a cap. Where tensor cores take
    operands from shared memory, there is more of that, and registers are for sums alone."""
    columns = head.main + head.wide + (head.rest if head.cut < head.head_dim else 0)
    if columns > 512:  # sums of heads of 512 leave no registers for more
        return Tile(64, 32, 8, 2) if arch == 100 else Tile(32, 32 if arch == 90 else 16, 8, 2)
    if arch in (90, 100):
        return Tile(128, 64, 8, 3) if columns <= 384 else Tile(64, 64, 8, 2)
    if columns <= (256 if plain else 192):
        return Tile(128, 64, 8, 3)
    return Tile(128, 32, 8, 3) if columns <= 320 else Tile(64, 32, 8, 2)


MOST_SPLITS = 64
"""Programs that may share the keys of a tile."""
LEAST_KEYS = 128
"""Fewest keys of each, where their number is at most what tables hold."""


def splits(tiles: int, longest: int, processors: int, part: int, room: int) -> int:
    """How many programs share the keys of each of `tiles`, so that a GPU has two a processor, where
    tables hold `longest` keys, a part is `part` numbers and all of them have `room` for as many."""
    wanted = -(-2 * processors // tiles)
    return max(1, min(wanted, MOST_SPLITS, longest // LEAST_KEYS, room // (tiles * part)))


@dataclass(frozen=True)
class Product:
    """What a program of latent.py computes at once: `rows` and `depth` columns of kv_b for
    `tokens`."""

    rows: int
    depth: int
    tokens: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As kernels take them."""
        return {"ROWS": self.rows, "DEPTH": self.depth, "TOKENS": self.tokens}

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def absorbed(step: int, nope: int) -> Product:
    """Of `absorb`, for a layout whose scales cover `step` columns."""
    return Product(min(64, power(nope, LEAST)), min(128, step), 16, 4, 2)


def lifted(step: int, v_dim: int) -> Product:
    """Of `lift`."""
    return Product(min(64, power(v_dim, LEAST)), min(128, step), 16, 4, 3)
