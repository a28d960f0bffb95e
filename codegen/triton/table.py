"""Every kernel by its name: its arguments and its tiles by architecture; and compilation ahead of
time, on any machine, with what the GPU's assembler says of the result.

Tiles are chosen so that nothing is spilled and a tile's part of shared memory fits the smallest
architecture of its row.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hmc.codegen.expr import SWIGLU
from hmc.codegen.triton.build import ANY_ADDRESS, ANY_NUMBER, kernels
from hmc.codegen.triton.layout import Layout

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may have, by compute capability."""

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

    def of(self, layout: Layout) -> Tile:
        """As many columns in the steps that a layout's scales allow, but of wide codes no more than
        LINE bytes of a row; of codes of several terms, which fill registers, as of f32, for fewer
        tokens, and by more threads.
        """
        several = layout.terms > 1
        columns = min(self.depth, 8 * LINE // (32 if several else layout.unit))
        depth = min(columns, layout.step)
        found = replace(self, depth=depth, repeat=columns // depth)
        if several:
            return replace(found, tokens=min(self.tokens, 64), warps=8, stages=3)
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
    "experts_down": {_ANY: ((24, _LONG), (_ANY, _MANY))},
    "experts_down_few": {_ANY: ((_ANY, _LONG),)},
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


def tile(name: str, arch: int, tokens: int, eights: bool = False) -> Tile:
    """The tile of a kernel on `arch` (or the one that it follows) for `tokens`; `eights`: of x as
    two FP8 numbers."""
    known = max((each for each in SHARED if each <= arch), default=min(SHARED))
    tiles = (_EIGHTS if eights else _TILES)[name]
    found = tiles.get(known, tiles[_ANY])
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


@dataclass(frozen=True)
class Compiled:
    """What came of a kernel: registers and spilled bytes of a thread, bytes of shared memory of a
    program, and the tensor cores' instruction ("" for none).
    """

    registers: int
    spilled: int
    shared: int
    instruction: str


_POINTERS = {
    "x": "*bf16", "act": "*bf16", "bias": "*fp32", "y": "*fp32", "partials": "*fp32",
    "routing": "*fp32", "values": "*fp32", "counters": "*i32", "slots": "*i64", "edges": "*i64",
    "begins": "*i64", "ends": "*i64", "ids": "*i32", "table": "*i64", "found": "*i32",
    "codes": "*fp8e4nv", "scales": "*fp32",
}  # fmt: skip
_WORDS = {"f32": "*fp32", "f16": "*fp16", "bf16": "*bf16"}
_TARGET = re.compile(r"\.target (\w+)")
_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


def compile(
    name: str,
    layout: Layout,
    sizes: Mapping[str, int],
    arch: int,
    tile: Tile,
    *,
    act: str = SWIGLU,
    eights: bool = False,
    types: Mapping[str, str] | None = None,
    **constants: Any,
) -> Compiled:
    """Compile kernel `name` for compute capability `arch` (90 for 9.0), as it is when launched with
    those `sizes` (arguments that are not among them may be any number): a launch then finds it in
    Triton's cache on disk.

    `types` of pointers other than the usual ones, `constants` besides the tile's. Raises what
    Triton raises, and ImportError where there is none.
    """
    compiler = importlib.import_module("triton.compiler")
    backend = importlib.import_module("triton.backends.compiler")
    kernel = getattr(kernels(layout, act, eights), name)
    tile = tile.of(layout)
    given = {**tile.constants, **constants}
    if "columns" in sizes:
        sizes = {"stride": layout.stride(sizes["columns"]), **sizes}
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    whole: dict[tuple[int, ...], list[list[Any]]] = {}
    for at, argument in enumerate(inspect.signature(kernel.fn).parameters):
        if argument in given or (sizes.get(argument) == 1 and argument not in ANY_NUMBER):
            signature[argument] = "constexpr"
            fixed[at,] = given.get(argument, 1)
        elif at == 0 and eights and name != "terms":
            signature[argument] = ("*fp8e4nv", "*fp32")
            whole.update({(at, i): _SIXTEENS for i in range(2)})
        elif argument in ("planes", "others"):
            signature[argument] = _planes(layout)
            whole.update({(at, i): _SIXTEENS for i in range(layout.planes + 1)})
        elif argument in _POINTERS:
            signature[argument] = {**_POINTERS, **(types or {})}[argument]
            if argument not in ANY_ADDRESS:
                whole[at,] = _SIXTEENS
        else:
            signature[argument] = "i32"
            if sizes.get(argument, 1) % 16 == 0 and argument not in ANY_NUMBER:
                whole[at,] = _SIXTEENS
    source = compiler.ASTSource(kernel, signature, fixed, whole)
    target = backend.GPUTarget("cuda", arch, 32)
    made = compiler.compile(source, target=target, options=tile.options)
    ptx = made.asm["ptx"]
    found = next((each for each in _INSTRUCTIONS if each in ptx), "")
    return Compiled(*_assembled(ptx, arch), made.metadata.shared, found)


_SIXTEENS = [["tt.divisibility", 16]]


def _planes(layout: Layout) -> tuple[str, ...]:
    codes = _WORDS.get(layout.kind, f"*u{layout.unit}")
    return (codes, *(_WORDS.get(scale.kind, "*u8") for scale in layout.scales), "*fp32")


def _assembled(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as ptxas reports them."""
    nvidia = importlib.import_module("triton").knobs.nvidia
    tool = nvidia.ptxas if arch < 100 else getattr(nvidia, "ptxas_blackwell", nvidia.ptxas)
    target = _TARGET.search(ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={target[1]}", str(path), "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", told)
    spilled = re.search(r"(\d+) bytes spill stores", told)
    assert registers is not None and spilled is not None
    return int(registers[1]), int(spilled[1])
