"""What two plans may differ in, as data: a record for each kind of change, `PlanDiff` for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

ABSENT = "-"
"""What stands for a side that has no such thing."""

Status = Literal["added", "removed", "changed"]


@dataclass(frozen=True)
class Change:
    """One value that differs; an absent side is "-"."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Moved:
    """Routed experts that live elsewhere, in all of `layers`; `count` and `bytes` over all of them
    (bytes as stored in the plan that has the layer)."""

    layers: str
    before: str
    after: str
    experts: str
    count: int
    bytes: int


@dataclass(frozen=True)
class LedgerChange:
    """Bytes of one kind (or the "total") on one device; details where only they differ."""

    device: str
    kind: str
    before: int
    after: int
    detail: str = ""

    @property
    def delta(self) -> int:
        """Bytes more than before."""
        return self.after - self.before


@dataclass(frozen=True)
class NamedChange:
    """A kernel or weight that one side alone has, or that differs; `detail` names the fields."""

    name: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class PhaseChange:
    """Steps added, removed and changed by op, `fields` by how many of the changed steps they differ
    in, and what else of the phase differs."""

    phase: str
    status: Status
    steps_before: int
    steps_after: int
    added: Mapping[str, int]
    removed: Mapping[str, int]
    changed: Mapping[str, int]
    fields: Mapping[str, int]
    facts: tuple[Change, ...]


@dataclass(frozen=True)
class DecisionChange:
    """A decision that one side alone took, or took otherwise."""

    by: str
    subject: str
    status: Status
    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class PlanDiff:
    """Everything two plans differ in."""

    facts: tuple[Change, ...]
    placement: tuple[Moved, ...]
    ledger: tuple[LedgerChange, ...]
    kernels: tuple[NamedChange, ...]
    phases: tuple[PhaseChange, ...]
    weights: tuple[NamedChange, ...]
    decisions: tuple[DecisionChange, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not any(vars(self).values())

    def as_json(self) -> dict[str, Any]:
        """Plain values; ledger rows with their delta."""
        found = {"equal": self.equal, **asdict(self)}
        rows = zip(found["ledger"], self.ledger, strict=True)
        found["ledger"] = [row | {"delta": change.delta} for row, change in rows]
        return found
