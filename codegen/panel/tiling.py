"""Sizes of the many-token matmul: which form a spec takes, and where its scratch holds what.

The routines that work with them are in codegen/panel/panel.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.codegen.isa import TIERS, in_whole_numbers
from hmc.codegen.spec import FP8_BLOCK, KernelSpec

VECTORS = 2
"""Vectors of weight rows in a panel."""

CHUNK = 128
"""Weights of a row that are decoded at once: one block of FP8 scales; the panel fits L1."""


@dataclass(frozen=True)
class Form:
    """How one spec multiplies: everything here follows from its format, tier and K.

    `dot` and `whole` tell the forms apart; `tile` tokens are multiplied at once; `group` weights of
    a row share a scale (0: no scales).
    """

    spec: KernelSpec
    k: int
    lanes: int
    dot: bool
    whole: bool
    tile: int
    group: int

    @staticmethod
    def of(spec: KernelSpec) -> Form:
        """The form of `spec` (params: k; int4 also group, scale_bits)."""
        lanes = TIERS[spec.isa].lanes
        return Form(
            spec=spec,
            k=spec["k"],
            lanes=lanes,
            dot=spec.isa == "avx512_bf16" and spec.weight in ("fp8", "bf16", "int4"),
            whole=in_whole_numbers(spec.isa, spec.weight),
            tile=spec.tiled("tokens", 12 if lanes == 16 else 6),
            group={"fp8": FP8_BLOCK, "int4": spec.get("group", 128)}.get(spec.weight, 0),
        )

    @property
    def step(self) -> int:
        """Weights of a row that one multiply takes."""
        return 2 if self.dot or self.whole else 1

    @property
    def in_place(self) -> bool:
        """Whether fp8 weights of a panel and activations are scaled as unpack.py says."""
        return self.spec.weight == "fp8" and not self.dot

    @property
    def scaled(self) -> bool:
        """Whether sums are scaled, not the weights of a panel."""
        return self.step == 2 and self.group > 0

    @property
    def rows(self) -> int:
        """Rows of a panel."""
        return VECTORS * self.lanes

    @property
    def chunks(self) -> int:
        """Chunks of K, the last of which may be short."""
        return -(-self.k // CHUNK)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Weights of a chunk and how many chunks have so many: whole ones first."""
        full, tail = divmod(self.k, CHUNK)
        return [(length, n) for length, n in ((CHUNK, full), (tail, 1)) if length and n]

    @property
    def scale_bytes(self) -> int:
        """Bytes of one stored scale: f32, or bf16 where int4 says scale_bits = 16."""
        return self.spec.get("scale_bits", 32) // 8 if self.spec.weight == "int4" else 4

    @property
    def scale_stride(self) -> int:
        """Bytes from one row of stored scales to the next (fp8: one row of blocks)."""
        return -(-self.k // self.group) * self.scale_bytes if self.group else 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's chunk in the packed copy."""
        return CHUNK * 4 // self.step

    @property
    def block(self) -> int:
        """Most tokens that one pass over the weights multiplies; their packed copy is bounded."""
        fits = self.spec.tiled("x_bytes", 1536 << 10) // (self.chunks * self.token_bytes)
        return max(48, min(256, fits))

    # Scratch: panel, scales f32 [group][rows], totals f32 [block][rows], packed tokens and, in the
    # whole form, what each chunk of a token is multiplied by: f32 [chunk][token].

    @property
    def scales_offset(self) -> int:
        """Where the scales start."""
        return CHUNK // self.step * self.rows * 4

    @property
    def totals_offset(self) -> int:
        """Where the totals start; a chunk has up to four scale groups."""
        return self.scales_offset + 4 * self.rows * 4

    @property
    def x_offset(self) -> int:
        """Where the packed tokens start."""
        return self.totals_offset + self.block * self.rows * 4

    @property
    def factors_offset(self) -> int:
        """Where the factors of the tokens' chunks start."""
        return self.x_offset + self.chunks * self.block * self.token_bytes

    @property
    def scratch_bytes(self) -> int:
        """Scratch of one worker, a multiple of 64."""
        return self.factors_offset + (self.chunks * self.block * 4 + 63) // 64 * 64 * self.whole
