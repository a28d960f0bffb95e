"""What a kernel is (`KernelSpec`): with arguments.py the contract between passes, codegen and
runtime.

Every kernel has one native signature, `void kernel(i64* args, i64 worker, i64 workers, i64 span)`:
`args` is a packed block of 64-bit words laid out as `ARGS[op]` says, `worker` of `workers` is who
calls. All workers call the same kernel with the same block and each does its share, so a kernel
splits its own work; it never synchronises. Kernels that stream weights (linear, gate_up, experts_*)
take any pieces of the work instead: shares `worker` to `worker + span - 1` of `workers`; for all
others `span` is 1. A reader of what a kernel wrote must be ordered after it by a barrier
(runtime/host/program.py places them).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass

from hmc.codegen.isa import TIERS, Isa

WeightFormat = str
"""`""` (none), or the name of a row of hmc/formats."""

MAX_TOKENS = 16
"""Largest batch of a native (decode) kernel; larger ones go to the prefill kernels."""
MAX_TAPS = 8
"""Most taps of a short convolution: their inputs are in registers."""


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to build: hashable, and its hash is symbol name and cache key.

    `op` names an entry of `ARGS`; `isa` a tier of codegen/isa.py; `weight` the storage format of
    the weights; `out` the format of the result ("f32" or "bf16"); `params` the sizes fixed at
    compile time, sorted by name (for instance k, tokens, heads, head_dim, block); `tile` choices
    made by measurement (rows, prefetch bytes ahead); `expr` arithmetic that is compiled in, as the
    text of an expression (codegen/expr.py).
    """

    op: str
    isa: str
    weight: WeightFormat = ""
    out: str = "f32"
    params: tuple[tuple[str, int], ...] = ()
    tile: tuple[tuple[str, int], ...] = ()
    expr: str = ""

    @staticmethod
    def of(
        op: str,
        isa: str,
        *,
        weight: WeightFormat = "",
        out: str = "f32",
        tile: Mapping[str, int] | None = None,
        expr: str = "",
        **params: int,
    ) -> KernelSpec:
        """Build a spec with `params` and `tile` in canonical order."""
        sizes, tiles = (tuple(sorted(each.items())) for each in (params, tile or {}))
        return KernelSpec(op, isa, weight, out, sizes, tiles, expr)

    def __getitem__(self, name: str) -> int:
        """A compile-time size; `KeyError` names what is absent."""
        for key, value in self.params:
            if key == name:
                return value
        raise KeyError(f"kernel {self.op} has no parameter {name}")

    def get(self, name: str, default: int = 0) -> int:
        """A compile-time size, or `default`."""
        return dict(self.params).get(name, default)

    def tiled(self, name: str, default: int) -> int:
        """A tile choice, or `default`."""
        return dict(self.tile).get(name, default)

    @property
    def tier(self) -> Isa:
        """The row of its tier."""
        return TIERS[self.isa]

    @property
    def digest(self) -> str:
        """16 hex digits over every field: the cache key's part that depends on the spec."""
        fields = [self.op, self.isa, self.weight, self.out, self.params, self.tile, self.expr]
        return hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()[:16]

    @property
    def symbol(self) -> str:
        """Name of the kernel's function in machine code, e.g. `linear_fp8_avx512_bf16_1f0c...`."""
        return "_".join(filter(None, (self.op, self.weight, self.isa, self.digest)))


_Accepts = Mapping[str, Container[int]]
_POWERS = (1, 2, 4, 8, 16)
_BY_ROWS: _Accepts = {"rows": _POWERS, "streams": _POWERS, "prefetch": range((1 << 24) + 1)}
_BY_TOKENS: _Accepts = {"tokens": range(1, 13)}
TILES: Mapping[str, _Accepts] = {
    **dict.fromkeys(("linear", "gate_up", "experts_gate_up", "experts_down"), _BY_ROWS),
    **dict.fromkeys(("gemm", "grouped_gate_up", "grouped_down"), _BY_TOKENS),
}
"""op -> tile choice of `KernelSpec.tile` -> values that emitters take."""
_BATCH = 16
"""What rows x streams must divide (codegen/decode/tiles.py: GRAIN)."""


def tile_fault(op: str, tile: Mapping[str, int]) -> str:
    """Why emitters do not take these tile choices of a kernel; empty where they do."""
    accepts = TILES.get(op, {})
    for name, value in tile.items():
        if name not in accepts or value not in accepts[name]:
            return f"no tile choice {name}={value}"
    batch = tile.get("rows", 4) * tile.get("streams", 4)
    if accepts is _BY_ROWS and _BATCH % batch:
        return f"rows x streams is {batch} (unset: 4 each), it must divide {_BATCH}"
    return ""
