"""Expressions over rows: which operands one has, how wide they are, and what of it has a column for
every element.

A row has `width` columns in `groups` equal groups. Operands by name: inputs x0, ... in f32 and b0,
... in bf16, of `width` columns or one for each group; vectors v0, ... of `width` columns, of those
of one group (then for all of them), or of 1; vectors g0, ... of one for each group. The result has
`width` columns, or one a group where every operand outside of sums has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from hmc.codegen.expr import MASKS, REDUCTIONS, Expr, leaf, parse
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}{number}" for number in range(count))


F32_INPUTS: Final = _numbered("x", 8)
BF16_INPUTS: Final = _numbered("b", 8)
INPUTS: Final = F32_INPUTS + BF16_INPUTS
VECTORS: Final = _numbered("v", 8)
BY_GROUP: Final = _numbered("g", 4)
WEIGHTS: Final = VECTORS + BY_GROUP


@dataclass(frozen=True)
class Rowwise:
    """An expression and the `columns` of each of its operands; `KernelError` where they do not fit
    together.
    """

    text: str
    width: int
    groups: int
    columns: tuple[tuple[str, int], ...]

    @staticmethod
    def of(spec: KernelSpec) -> Rowwise:
        """What a kernel is built for: params width, groups and each operand's columns."""
        return Rowwise.given(spec.expr, dict(spec.params))

    @staticmethod
    def given(text: str, sizes: Mapping[str, int]) -> Rowwise:
        """The same from one mapping of sizes."""
        columns = {name: count for name, count in sizes.items() if name not in ("width", "groups")}
        return Rowwise(text, sizes["width"], sizes["groups"], tuple(sorted(columns.items())))

    def __post_init__(self) -> None:
        if self.tree.op in MASKS or min(self.groups, self.width) < 1 or self.width % self.groups:
            raise self._error(f"a row of {self.width} columns in {self.groups} groups")
        names = {name for name, _ in self.columns}
        if odd := names.symmetric_difference(self.tree.leaves) | (names - set(INPUTS + WEIGHTS)):
            raise self._error(f"operand {min(odd)}")
        for name, count in self.columns:
            fitting = (self.width, *((self.size, 1) if name in VECTORS else (self.groups,)))
            if count not in (fitting if name not in BY_GROUP else (self.groups,)):
                raise self._error(
                    f"{name} of {count} columns in a row of {self.width} in {self.groups} groups"
                )

    def _error(self, what: str) -> KernelError:
        return KernelError(f"pointwise {self.text!r}: {what} does not fit")

    @cached_property
    def tree(self) -> Expr:
        """The expression."""
        return parse(self.text)

    @property
    def sizes(self) -> dict[str, int]:
        """What of it is compiled into a kernel."""
        return {"width": self.width, "groups": self.groups, **dict(self.columns)}

    @property
    def size(self) -> int:
        """Columns of a group."""
        return self.width // self.groups

    @property
    def result(self) -> int:
        """Columns of the result."""
        return self.width if self.wide(self.tree) else self.groups

    def wide(self, tree: Expr) -> bool:
        """Whether a value has a column for every element of a group."""
        if tree.op in REDUCTIONS:
            return False
        if tree.name:
            one = 1 if tree.name in VECTORS else self.groups
            return self.size == 1 or dict(self.columns)[tree.name] != one
        return any(self.wide(arg) for arg in tree.args)

    def wide_operand(self, name: str) -> bool:
        """The same of an operand."""
        return self.wide(leaf(name))

    def by_group(self, name: str, operand: Any) -> Any:
        """An operand, a numpy or torch array, in the shape in which operations broadcast and sums
        run over the last axis: inputs [T, columns] as [T, groups, columns / groups], vectors of
        whole rows as [groups, columns / groups], those of one for each group as [groups, 1].
        """
        if name in BY_GROUP:
            return operand.reshape(self.groups, 1)
        if name in VECTORS:
            return operand.reshape(self.groups, -1) if len(operand) == self.width else operand
        return operand.reshape(len(operand), self.groups, -1)
