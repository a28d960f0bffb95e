"""Tiles of matrix products by kernel and architecture.

Tiles are chosen so that nothing is spilled and a tile's part of shared memory fits the smallest
architecture of its row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hmc.codegen.triton.layout import LEAST, Layout

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may have, by compute capability."""

_WIDE_PRODUCTS = (90, 100)
"""Architectures whose products are of so many rows that registers, or a memory apart, hold those of
a few steps alone."""

_SHORT_OF_REGISTERS = (86, 89)
"""Architectures where a third step under way makes codes of several terms spill."""

LINE = 128
"""Bytes of a row of codes that are loaded at once at most."""


@dataclass(frozen=True)
class Tile:
    """What a program computes: `rows` of the matrix for `tokens`, `repeat` times `depth` columns at
    a time, by `warps` of 32 threads, with so many columns of `stages` under way.
    """

    rows: int
    tokens: int
    depth: int
    warps: int
    stages: int
    repeat: int = 1

    def of(self, layout: Layout, arch: int) -> Tile:
        """As many columns in the steps that a layout's scales allow, but of wide codes no more than
        LINE bytes of a row; of codes of several terms, which fill registers, as of f32, for fewer
        tokens, and by more threads; for fewer tokens also of the shortest steps where products are
        wide, and of 8 bits less zeros, by more threads too.
        """
        several = layout.terms > 1
        columns = min(self.depth, 8 * LINE // (32 if several else layout.unit))
        depth = min(columns, layout.step)
        found = replace(self, depth=depth, repeat=columns // depth)
        if several:
            stages = 2 if arch in _SHORT_OF_REGISTERS else 3
            return replace(found, tokens=min(self.tokens, 64), warps=8, stages=stages)
        if layout.bits == 8 and any(scale.zero for scale in layout.scales):
            return replace(found, tokens=min(self.tokens, 32), warps=8)
        if arch in _WIDE_PRODUCTS and layout.step == LEAST:
            return replace(found, tokens=min(self.tokens, 32))
        return found

    @property
    def constants(self) -> dict[str, int]:
        """As kernels take them."""
        return {"ROWS": self.rows, "TOKENS": self.tokens, "DEPTH": self.depth,
                "REPEAT": self.repeat}  # fmt: skip

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


_ANY = 0
_FEW, _WIDE = Tile(64, 16, 128, 4, 3), Tile(64, 16, 128, 8, 3)
_MANY = Tile(128, 64, 64, 8, 3)
_LONG, _NARROW = Tile(64, 16, 128, 4, 4), Tile(128, 32, 128, 8, 3)
_TILES: dict[str, dict[int, tuple[tuple[int, Tile], ...]]] = {
    "linear": {_ANY: ((16, _LONG), (512, Tile(128, 64, 128, 8, 3)),
                      (_ANY, Tile(128, 128, 64, 8, 3)))},
    "pair": {_ANY: ((16, _FEW), (_ANY, _MANY)), 120: ((16, _WIDE), (_ANY, _MANY))},
    "experts_act": {_ANY: ((24, _FEW), (_ANY, _MANY)), 100: ((24, _WIDE), (_ANY, _MANY)),
                    120: ((24, _WIDE), (_ANY, _MANY))},
    "experts_down": {_ANY: ((24, _LONG), (_ANY, _MANY)), 120: ((24, _FEW), (_ANY, _MANY))},
    "experts_down_few": {_ANY: ((_ANY, _LONG),), 86: ((_ANY, _FEW),), 89: ((_ANY, _FEW),)},
}  # fmt: skip
"""Of a kernel, by architecture: up to how many tokens (an expert's on average) a tile is for."""
_EIGHTS: dict[str, dict[int, tuple[tuple[int, Tile], ...]]] = {
    "linear": {_ANY: ((_ANY, Tile(128, 64, 128, 8, 3)),)},
    "pair": {_ANY: ((_ANY, _NARROW),), 90: ((_ANY, Tile(128, 64, 128, 8, 3)),),
             100: ((_ANY, Tile(64, 64, 128, 8, 3)),)},
    "experts_act": {_ANY: ((24, _FEW), (_ANY, _NARROW)),
                    90: ((24, _FEW), (_ANY, Tile(128, 64, 128, 8, 3))),
                    100: ((24, _WIDE), (_ANY, Tile(64, 64, 128, 8, 3)))},
    "experts_down": {_ANY: ((24, _LONG), (_ANY, _MANY)),
                     100: ((24, _LONG), (_ANY, _NARROW)), 120: ((24, _LONG), (_ANY, _NARROW))},
}  # fmt: skip
"""The same of x as two FP8 numbers."""

TERMS = 16
"""Tokens of a program of `terms`."""
FEW = 16
"""Most tokens of `experts_down_few`: those of its tile."""
PARTIALS = 1 << 21
"""f32 numbers that hold parts of sums."""
BOUNDS = 128
"""Experts of a program of `bounds`."""
LEAST_SPAN = 256
"""Fewest tokens whose activations are kept at once, whatever they take."""
_WAVES = 4
"""Programs a processor takes at once in sums that wait for memory."""


def known(capability: int) -> int:
    """The one of `SHARED` that kernels for a compute capability (90 for 9.0) are chosen by: itself
    or the one that it follows."""
    return max((each for each in SHARED if each <= capability), default=min(SHARED))


def tile(name: str, arch: int, tokens: int, eights: bool = False) -> Tile:
    """The tile of a kernel on `arch`, one of `SHARED`, for `tokens`; `eights`: of x as two FP8
    numbers."""
    tiles = (_EIGHTS if eights else _TILES)[name]
    found = tiles.get(arch, tiles[_ANY])
    return next(each for most, each in found if not most or tokens <= most)


def parts(tile: Tile, tiles: int, columns: int, processors: int, pair: bool) -> int:
    """How many programs share the columns of each of `tiles`, so that a GPU has enough to do; each
    has two steps of them at least.
    """
    steps = -(-columns // (tile.depth * tile.repeat))
    return max(1, min(most_parts(tile, tiles * (1 + pair), processors), steps // 2))


def most_parts(tile: Tile, tiles: int, processors: int) -> int:
    """How many programs may share a tile, so that together they fill a GPU and their sums their
    memory."""
    waves = _WAVES if tile.tokens <= FEW else 1
    return max(1, min(-(-waves * processors // tiles),
                      PARTIALS // (tiles * tile.rows * tile.tokens)))  # fmt: skip


def spans(rows: int, tokens: int, processors: int) -> int:
    """Into how many ranges tokens are divided for `experts_down`, each with a program for every
    tile of rows: the fewer, the more tokens of an expert are multiplied at once.
    """
    wide = _LONG.rows
    return max(1, min(-(-processors // -(-rows // wide)), tokens // LEAST_SPAN))
