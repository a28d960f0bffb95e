"""docs/formats.md holds the table that the rows of formats give."""

from __future__ import annotations

from pathlib import Path

import pytest

from hmc.bench.formats import COLUMNS, described
from hmc.formats import FORMATS

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_is_that_of_the_rows(name: str) -> None:
    line = f"| {' | '.join(described(FORMATS[name]))} |"
    assert line in DOCS.read_text(), f"{DOCS} lacks this line: hmc bench formats prints it\n{line}"


def test_its_head() -> None:
    assert f"| {' | '.join(COLUMNS)} |" in DOCS.read_text()
