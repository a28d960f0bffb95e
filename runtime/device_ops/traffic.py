"""Counts what ranks send each other, and what they would send by routing first.

Counted by rank and layer, in bytes handed to the collective for other ranks (an all-gather sends a
rank's rows to each of them). Beside it stands *dispatch/combine*, from the routing that really
happened: every token's bf16 row sent to the rank of each chosen expert that is elsewhere, and one
bf16 row back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hmc.ops import OPS
from hmc.plan import Phase, Step

Kind = Literal["gathered", "exchanged", "context", "past", "dispatched", "combined"]
Counts = Counter[tuple[int, Kind]]
"""Bytes by layer and kind."""


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes one rank sent for one layer, over all calls.

    `gathered` activations before the router, `exchanged` partial sums of experts, `context` keys
    and values (or latents) of the call's tokens, `past` those of tokens before it; `dispatched` and
    `combined` are what dispatch/combine would have sent in place of the first two.
    """

    rank: int
    layer: int
    gathered: int = 0
    exchanged: int = 0
    context: int = 0
    past: int = 0
    dispatched: int = 0
    combined: int = 0

    @property
    def experts(self) -> int:
        """Sent so that every expert's tokens are computed."""
        return self.gathered + self.exchanged


def table(counts: Sequence[Counts]) -> tuple[LayerTraffic, ...]:
    """One row for each rank and layer; `counts` by rank."""
    return tuple(
        LayerTraffic(rank, layer, **{kind: n for (at, kind), n in found.items() if at == layer})
        for rank, found in enumerate(counts)
        for layer in sorted({layer for layer, _ in found})
    )


def feeds_attention(phase: Phase, step: Step) -> str:
    """The role in which attention reads what a collective gathers; "" where it does not."""
    written = {operand.buffer for operand in step.outputs.values()}
    for reader in phase.steps:
        if reader.layer == step.layer and OPS[reader.op].attends:
            for role, operand in reader.inputs.items():
                if operand.buffer in written:
                    return role
    return ""
