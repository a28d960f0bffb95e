"""What a probe is asked for and what it finds: effort, measurements, rates."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hmc.machine.model import Rate


@dataclass(frozen=True)
class Effort:
    """How much is measured: passes of each case, 10^6 bytes of weights and of streaming reads (0:
    far beyond the caches), tokens a call of decode matmuls, every how many of the ways to read is
    tried, and the least size of a matrix or copy on a GPU in bytes.
    """

    passes: int
    weights: int
    stream: int
    tokens: tuple[int, ...]
    every: int
    device_bytes: int


FULL = Effort(9, 640, 0, (1, 2, 4, 8, 16), 1, 256 << 20)
QUICK = Effort(5, 320, 512, (1, 4), 8, 64 << 20)


@dataclass(frozen=True)
class Measurement:
    """`values` of every pass in SI units; `detail` says of what and how."""

    what: str
    unit: str
    values: tuple[float, ...]
    detail: str

    @property
    def median(self) -> float:
        """Median of the passes."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half of the distance from the least to the most pass, relative to the median."""
        return (max(self.values) - min(self.values)) / (2 * self.median)

    def rate(self) -> Rate:
        """As a rate, measured today."""
        day = datetime.now(UTC).date().isoformat()
        source = f"measured {day}: {self.detail}"
        return Rate(value=self.median, kind="measured", source=source, spread=round(self.spread, 4))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "what": self.what,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "passes": len(self.values),
            "detail": self.detail,
        }
