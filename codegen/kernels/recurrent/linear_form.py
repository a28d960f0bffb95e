"""Sizes and scratch of `linear_attention_prefill`, fixed by its spec."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hmc.codegen.spec import KernelSpec

_CHUNK, _VECTORS = 16, 2
"""Measured: chunks of 8 and 32, tiles of 1 and 4 vectors are as fast or slower."""


@dataclass(frozen=True)
class Form:
    """A chunk of `chunk` tokens of one head; products make tiles of up to `high` rows by `vectors`
    vectors of `lanes`.
    """

    chunk: int
    keys: int
    lanes: int
    high: int
    vectors: int

    @staticmethod
    def of(spec: KernelSpec) -> Form:
        """Tiles take up to three quarters of the registers."""
        tier = spec.tier
        return Form(_CHUNK, spec["key_dim"], tier.lanes, tier.token_tile, _VECTORS)

    @property
    def pitch(self) -> int:
        """Elements from one row of keys to the next."""
        return -(-self.keys // self.lanes) * self.lanes

    @property
    def block(self) -> int:
        """Columns of the state that a tile has."""
        return self.vectors * self.lanes

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offsets of the parts, rows of tokens first: `k`, `q` (scaled) and `decay` [chunk,
        keys]; `left` [2 chunk, keys], keys and queries as they meet the state before the chunk;
        `whole` [keys], the decay of all of it; `ends` [keys, chunk], keys as they decay to its end;
        `beta` [chunk]; `pairs` [2 chunk, chunk], what keys and queries have to do with earlier
        keys; `mix` [2 chunk, chunk], what is new, and results, of what the state does not explain;
        `rest` and `sums` [chunk, block], that, and what queries find in the state; `new` [chunk,
        block]; `end`.
        """
        row, square = self.chunk * self.pitch, self.chunk * self.chunk
        sizes = dict.fromkeys(("k", "q", "decay"), row)
        sizes |= {"left": 2 * row, "whole": self.pitch, "ends": row, "beta": self.chunk}
        sizes |= {"pairs": 2 * square, "mix": 2 * square}
        sizes |= dict.fromkeys(("rest", "sums", "new"), self.chunk * self.block)
        found, at = {}, 0
        for name, count in sizes.items():
            found[name] = at
            at += 4 * count + 63 & ~63
        return found | {"end": at}


def linear_scratch_bytes(spec: KernelSpec) -> int:
    """Bytes of `scratch` for each worker, best aligned to 64."""
    return Form.of(spec).offsets["end"]
