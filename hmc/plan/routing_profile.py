"""Recorded routing: how often each expert was chosen, in a part to learn from and one held out.

The file (JSON) that a recording run writes:

    {"format": "hmc-routing", "learn": {"tokens": N, "counts": {"3": [c0, c1, ..], ..}},
     "held_out": {"tokens": M, "counts": {..}}}

A placement learned from one part is judged on the other: hot experts of one text are often cold in
the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hmc.errors import UsageError


class RoutingCounts(BaseModel):
    """Choices of each expert by layer, out of `tokens` tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: int = Field(ge=1)
    counts: dict[int, tuple[int, ...]]

    def probabilities(self, layer: int, experts: int) -> list[float]:
        """The chance of each expert to be chosen by a token; a layer not recorded is even: []."""
        counts = self.counts.get(layer)
        return [] if counts is None else [count / self.tokens for count in counts][:experts]


class RoutingProfile(BaseModel):
    """Counts to learn from, and counts to judge by."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: str = "hmc-routing"
    learn: RoutingCounts
    held_out: RoutingCounts

    def check(self, experts_by_layer: Mapping[int, int]) -> None:
        """Raise `UsageError` for a model whose routed layers have other numbers of experts."""
        for part in (self.learn, self.held_out):
            for layer, counts in part.counts.items():
                experts = experts_by_layer.get(layer)
                if experts != len(counts):
                    raise UsageError(
                        f"routing profile: layer {layer} has {len(counts)} counts, the model"
                        f" {experts or 'no routed'} experts there: it was recorded with another"
                        " model"
                    )


def load_profile(path: str | Path) -> RoutingProfile:
    """Read a recorded profile; `UsageError` for a file that is none."""
    source = Path(path)
    try:
        return RoutingProfile.model_validate_json(source.read_text())
    except OSError as error:
        raise UsageError(f"routing profile {source}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(f"routing profile {source}: {where}: {first['msg']}") from error
