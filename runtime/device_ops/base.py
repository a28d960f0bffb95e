"""What an op function is given, and what it makes of a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Protocol, TypeVar

import torch

from hmc.plan import Operand, Phase, Plan, Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.link import Link
from hmc.runtime.device_ops.matmul import Expert, Matrix
from hmc.runtime.device_ops.shares import Call, Fixed, Share
from hmc.runtime.device_ops.triton.launch import Workspace
from hmc.runtime.memory.kv import KVCache

Work = Callable[[Call], None]
"""What a step does in one run of its phase, on at least one row of its share."""


class Sorted:
    """A call's slots (token * top_k + rank of its expert) [slots] in the order of their experts,
    and where each expert's begin: `edges` [experts + 1], on the device."""

    def __init__(self, slots: torch.Tensor, edges: torch.Tensor) -> None:
        self.slots, self.edges = slots, edges

    @cached_property
    def counted(self) -> list[int]:
        """The edges on the host, which waits for the device."""
        found: list[int] = self.edges.tolist()
        return found


Routed = dict[str, Sorted]
"""By the name of an `order` buffer."""


class Planned(Protocol):
    """What has to know a call before its steps."""

    def plan(self, call: Call, fixed: Fixed | None) -> None:
        """Called outside of captures; a call of `fixed` tensors may replay one."""
        ...


PlannedT = TypeVar("PlannedT", bound=Planned)


class Bound(Protocol):
    """One phase's memory, as its steps see it. Everything but the counts of rows is fixed."""

    plan: Plan
    phase: Phase
    kv: KVCache
    sorted: Routed
    link: Link | None
    """The way to the other ranks of the phase, where they are processes of their own."""

    def share(self, step: Step) -> Share:
        """The rows the step works on."""
        ...

    def device(self, step: Step) -> str:
        """Where the step computes: "gpu<n>", "host"; of a link the rank 0's."""
        ...

    def tensor(self, operand: Operand) -> torch.Tensor:
        """All rows of an operand's columns, [rows, width]; a view. A call uses the first ones."""
        ...

    def matrix(self, step: Step, role: str) -> Matrix:
        """A matrix of the step, resident or in its slot."""
        ...

    def vector(self, step: Step, role: str) -> torch.Tensor | None:
        """A vector of the step in its stored format; None where it has none of this role."""
        ...

    def experts(self, step: Step) -> dict[int, Expert]:
        """The experts that the step computes, resident or in its slot."""
        ...

    def workspace(self, step: Step) -> Workspace:
        """What split sums of Triton kernels share, of the step's device."""
        ...

    def planned(self, key: Hashable, calls: PlannedT) -> PlannedT:
        """`calls`, or what was given before with the same key: it is told of each call before the
        steps."""
        ...

    def adds(self, step: Step) -> bool:
        """Whether an experts step adds to what earlier ones left in y."""
        ...

    def cache(self, layer: int, state: str) -> torch.Tensor:
        """A layer's state on the home GPU: [tokens, width], or [slots, width] of one a sequence."""
        ...

    def before(self, call: Call, layer: int, state: str) -> torch.Tensor:
        """Cache rows of the tokens before a call's, in order: bf16 [past, width]."""
        ...

    def share_past(self, call: Call, layer: int, state: str) -> None:
        """Give the other ranks what `before` needs, or take it from rank 0."""
        ...

    def place(self, operand: Operand) -> str:
        """The device an operand's buffer is on."""
        ...

    def home(self, device: str) -> bool:
        """Whether the cache is on this device."""
        ...

    def copies(self, step: Step) -> list[tuple[int, torch.Tensor]]:
        """What a load moves: host address of each piece, and where on the device it goes."""
        ...

    def copies_of_experts(self, step: Step) -> dict[int, list[tuple[int, torch.Tensor]]]:
        """The same by expert, of a load of experts."""
        ...


OpFunction = Callable[[Bound, Step], Work]


def in_blocks(share: Share, row_bytes: int, block: Callable[[slice], object]) -> Work:
    """A work that does `block` for some rows of a share after the other: as many as keep to
    `scratch.BYTES`, where it makes `row_bytes` of each."""

    def work(call: Call) -> None:
        for part in scratch.blocks(0, call.count(share), row_bytes):
            block(part)

    return work


def ints(step: Step, *names: str) -> tuple[int, ...]:
    """Attributes of a step as integers."""
    return tuple(int(step.attrs[name]) for name in names)
