"""Sizes of the many-token matmul: its micro-kernel, and where its scratch holds what.

The routines that work with them are in codegen/panel/panel.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from hmc.codegen.expr import has_gate
from hmc.codegen.formats.forms import micro_of
from hmc.codegen.formats.micro import MicroKernel
from hmc.codegen.formats.order import has_order
from hmc.codegen.formats.planes import Beside, planes_of
from hmc.codegen.formats.weights import span_bytes
from hmc.codegen.native import is_native
from hmc.codegen.spec import KernelSpec
from hmc.formats.base import Kind

VECTORS = 2
"""Vectors of weight rows in a panel."""

_SIDE_BY_SIDE = frozenset({"grouped_gate_up"})
"""Ops whose panels are a vector of rows of one matrix beside one of another."""

CHUNK = 128
"""Weights of a row that are decoded at once: one block of FP8 scales; the panel fits L1."""


@dataclass(frozen=True)
class Form:
    """How one spec multiplies: everything here follows from its format, tier and K.

    `tile` tokens are multiplied at once; `copies` of packed tokens are one for each vector of rows
    of a panel where these are of matrices whose columns have orders of their own; `scales` and
    `zeros` are what lies beside codes that a native decoder reads, by place in `planes`.
    `straddles`: the rows of one vector may lie in two blocks of scales.
    """

    spec: KernelSpec
    k: int
    micro: MicroKernel
    tile: int
    straddles: bool = False

    @staticmethod
    def of(spec: KernelSpec) -> Form:
        """The form of `spec` (params: k; int4 also group, scale_dtype)."""
        form = Form(spec, spec["k"], micro_of(spec), spec.tier.token_tile)
        if form.held:
            form = replace(form, tile=form.tile // 2)
        return replace(form, tile=spec.tiled("tokens", form.tile))

    @cached_property
    def ordered(self) -> bool:
        """Whether columns lie in an order of their own."""
        return has_order(self.planes)

    @property
    def copies(self) -> int:
        """Packed copies of the tokens."""
        beside = self.spec.op in _SIDE_BY_SIDE and has_gate(self.spec.expr)
        return VECTORS if self.ordered and beside else 1

    @property
    def lanes(self) -> int:
        """Rows of a vector."""
        return self.micro.lanes

    @property
    def scaled(self) -> bool:
        """Whether sums are scaled, not the weights of a panel."""
        return self.micro.scales_sums and bool(self.scales or self.micro.group)

    @property
    def held(self) -> bool:
        """Whether totals stay in registers beside the sums of a group: a chunk has several, and
        storing the totals after each took a tenth of the time (Zen 4 stores 64 bytes in two
        cycles).
        """
        return self.scaled and self.group < CHUNK

    @property
    def scales(self) -> list[int]:
        """Which planes are scales of codes."""
        return self._beside("scale")

    @property
    def zeros(self) -> list[int]:
        """Which planes are zeros of codes."""
        return self._beside("zero")

    def _beside(self, kind: Kind) -> list[int]:
        native = is_native(self.spec)
        return [at for at, plane in enumerate(self.planes) if native and plane.kind == kind]

    @property
    def group(self) -> int:
        """Columns of a chunk that share all scales."""
        return self.micro.group or min([CHUNK, *(self.planes[at].columns for at in self.scales)])

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
    def planes(self) -> tuple[Beside, ...]:
        """What lies beside the codes."""
        return planes_of(self.spec)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk of a row's codes."""
        return span_bytes(self.spec.weight, CHUNK)

    @property
    def groups(self) -> int:
        """Most scales of a row in one chunk."""
        return CHUNK // self.group

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's chunk in the packed copy."""
        return CHUNK * 4 // self.micro.step

    @property
    def block(self) -> int:
        """Most tokens that one pass over the weights multiplies; their packed copy is bounded."""
        each = self.copies * self.chunks * self.token_bytes
        fits = self.spec.tiled("x_bytes", 1536 << 10) // each
        return max(48, min(256, fits))

    @property
    def token_numbers(self) -> int:
        """Numbers that are kept of a chunk of a token: its factor, and sums of its activations."""
        return int(self.micro.token_factors) + self.micro.token_sums

    # Scratch: panel, scales f32 [group][rows], minima where sums of tokens go with them, totals f32
    # [block][rows], and of each copy packed tokens and `token_numbers`: f32 [chunk][token][number].

    @property
    def scales_offset(self) -> int:
        """Where the scales start."""
        return CHUNK // self.micro.step * self.rows * 4

    @property
    def minima(self) -> int:
        """Floats from the scales to the minima; there is room for four groups at least."""
        return max(4, self.groups) * self.rows

    @property
    def totals_offset(self) -> int:
        """Where the totals start."""
        return self.scales_offset + self.minima * 4 * (2 if self.micro.token_sums else 1)

    @property
    def x_offset(self) -> int:
        """Where the first copy of the tokens starts."""
        return self.totals_offset + self.block * self.rows * 4

    @property
    def factors_offset(self) -> int:
        """Where the numbers of the tokens' chunks start in a copy."""
        return self.chunks * self.block * self.token_bytes

    @property
    def copy_bytes(self) -> int:
        """Of a copy of the tokens, a multiple of 64."""
        factors = self.chunks * self.block * 4 * self.token_numbers
        return self.factors_offset + (factors + 63) // 64 * 64

    @property
    def scratch_bytes(self) -> int:
        """Scratch of one worker, a multiple of 64."""
        return self.x_offset + self.copies * self.copy_bytes


def panel_scratch_bytes(spec: KernelSpec) -> int:
    """Bytes of `scratch` of a many-token matmul for one worker; worker w uses the w-th such piece.
    Best aligned to 64.
    """
    return Form.of(spec).scratch_bytes
