"""What dispatch/combine would have sent in place of SmallEP's collectives: counted on the device,
from the routing that really happens, while a rank routes.

A token's row goes, in bf16, to the rank of every chosen expert that is not its own, and one bf16
row comes back from each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from hmc.ops import OPS
from hmc.plan import Step
from hmc.ranges import expert_ranges
from hmc.runtime.device_ops.base import Bound, Work
from hmc.runtime.device_ops.shares import Call, Share
from hmc.runtime.device_ops.traffic import Counts

_BF16 = 2


class Routing:
    """What a rank would send by dispatch/combine, counted on the device while it routes."""

    def __init__(self, bound: Bound, rank: int) -> None:
        self._bound, self._rank = bound, rank
        self._sums: dict[int, torch.Tensor] = {}

    def counted(self, works: Iterable[Work]) -> list[Work]:
        """The works of the phase's steps, with what routers on this rank's GPU choose counted."""
        resource = f"gpu{self._rank}"
        return [
            self._after(step, work)
            if OPS[step.op].everywhere and step.resource == resource
            else work
            for step, work in zip(self._bound.phase.steps, works, strict=True)
        ]

    def take(self) -> Counts:
        """Counts since the last `take`; waits for the device."""
        counts: Counts = Counter()
        for layer, sums in self._sums.items():
            sent, answered = sums.tolist()
            counts[layer, "dispatched"] += sent
            counts[layer, "combined"] += answered
            sums.zero_()
        return counts

    def _after(self, step: Step, work: Work) -> Work:
        ids = self._bound.tensor(step.outputs["ids"])
        owners, width = self._owners(step.layer)
        owner = torch.tensor(owners, device=ids.device)
        sums = torch.zeros(2, dtype=torch.int64, device=ids.device)
        self._sums[step.layer] = sums
        rank, share = self._rank, Share("rank", self._rank, self._bound.phase.ranks)

        def both(call: Call) -> None:
            work(call)
            at = owner[ids[: call.tokens].long()]
            own = torch.cat([at[first:last] for first, last in share.pieces(call.tokens)])
            elsewhere = (own != rank).sum()
            for_others = (at == rank).sum() - (own == rank).sum()
            sums.add_(torch.stack((elsewhere, for_others)) * (_BF16 * width))

        return both

    def _owners(self, layer: int) -> tuple[list[int], int]:
        """The rank that computes each expert of a layer, and the width of a row."""
        found: dict[int, int] = {}
        width = 0
        for step in self._bound.plan.phase(self._bound.phase.name).steps:
            if OPS[step.op].routed and step.layer == layer:
                width = step.outputs["y"].width
                for expert in expert_ranges(str(step.attrs["range"])):
                    found[expert] = int(step.resource.removeprefix("gpu"))
        return [found[expert] for expert in range(len(found))], width
