"""docs/formats.md holds the table that the rows of formats give."""

from __future__ import annotations

from pathlib import Path

from hmc.codegen.isa import TIERS
from hmc.codegen.native import arithmetic, has_native
from hmc.formats import FORMATS, GROUP, WHOLE, Format, Plane, named

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def _size(count: int) -> str:
    return {WHOLE: "all", GROUP: "group"}.get(count, str(count))


def _plane(plane: Plane) -> str:
    bits = f", {plane.bits} bits each" if plane.bits else ""
    cover = "" if plane.rows == plane.columns == 1 else (
        f" for {_size(plane.rows)} x {_size(plane.columns)}"
    )  # fmt: skip
    kept = f", read as {' or '.join(plane.kept)}" if plane.kept else ""
    return f"{plane.name}: {' or '.join(plane.dtypes)}{bits}{cover}{kept}"


def _tiers(row: Format) -> str:
    native = [isa for isa in TIERS if has_native(isa, row.name)]
    return ", ".join(f"{isa} ({arithmetic(isa, row.name)})" for isa in native) or "made (f32)"


def _names(row: Format) -> str:
    ends = dict.fromkeys(end for plane in row.planes for end in plane.suffixes)
    return ", ".join(f"`{named('m.weight', end).removeprefix('m.')}`" for end in ends)


def table() -> str:
    """A row a format."""
    head = "| format | planes | tensors | exact in | native decoders |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| `{row.name}` | {'; '.join(_plane(plane) for plane in row.planes)} | {_names(row)} |"
        f" {', '.join(row.exact_in)} | {_tiers(row)} |\n"
        for row in FORMATS.values()
    )


def test_the_table_is_that_of_the_rows() -> None:
    assert table() in DOCS.read_text(), f"{DOCS} lacks this table:\n{table()}"
