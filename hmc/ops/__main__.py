"""Prints docs/ops.md, the table of all ops, from their rows: `python -m hmc.ops > docs/ops.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hmc.ops.row import Op, Role, WeightRole
from hmc.ops.table import OPS

HEAD = """# Ops

Steps of a plan by op: operands by role with the dtypes that they may have, weights, attributes.
What may be absent is in brackets, `x...` stands for x0, x1, ..., `*` for any name. Printed by
`python -m hmc.ops` from the rows in `hmc/ops`.

| op | runs on | reads | writes | weights | attributes |
| --- | --- | --- | --- | --- | --- |"""


def lines() -> Iterator[str]:
    """The file, line by line."""
    yield HEAD
    for row in sorted(OPS.values(), key=lambda row: row.name):
        yield f"| {' | '.join(_cells(row))} |"


def _cells(row: Op) -> tuple[str, ...]:
    weights = ", ".join(map(_named, row.weights))
    attrs = filter(None, (_typed(row.attrs), f"[{_typed(row.extra)}]" if row.extra else ""))
    operands = (", ".join(map(_operand, roles)) for roles in (row.inputs, row.outputs))
    return row.name, row.where, *operands, weights, " ".join(attrs)


def _operand(role: Role) -> str:
    return f"{_named(role)} {role.dtype.replace(' ', '/')}" + " in place" * bool(role.in_place)


def _named(role: Role | WeightRole) -> str:
    name = role.name + "..." * role.many
    return f"[{name}]" if role.optional else name


def _typed(attrs: Mapping[str, type]) -> str:
    return ", ".join(f"{name} {kind.__name__}" for name, kind in attrs.items())


if __name__ == "__main__":
    print("\n".join(lines()))
