"""JSON schemas of clients, checked before the grammar engine sees them: its recursion over a long
way of references ends the process. Nothing here recurses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

import networkx

from hmc.errors import UsageError

_MOST_LEVELS = 500
"""Of JSON within each other, references followed; the engine bears some 2,000 in 8 MB of stack."""
_MOST_VALUES = 5_000
"""Objects and arrays; 2,500 properties take the engine two seconds."""
_MOST_WALKED = 4 * _MOST_VALUES
"""Those that references lead to counted again."""
_DATA = frozenset({"const", "enum", "default", "examples"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def check(schema: dict[str, Any]) -> None:
    """Raise `UsageError` for a schema that is too large or too deep, or with a reference that leads
    out of it, nowhere or back to itself.
    """
    ways: networkx.DiGraph[str] = networkx.DiGraph()
    ways.add_node("#")
    values, waiting, deepest = 0, ["#"], {"#": 0}
    while waiting:
        place = waiting.pop()
        for level, part in _values(_target(schema, place)):
            values += 1
            if values > (_MOST_VALUES if place == "#" else _MOST_WALKED):
                raise _refused(f"more than {_MOST_VALUES} objects and arrays")
            deepest[place] = max(deepest[place], level)
            reference = part.get("$ref") if isinstance(part, dict) else None
            if isinstance(reference, str):
                if reference not in deepest:
                    deepest[reference] = 0
                    waiting.append(reference)
                ways.add_edge(place, reference)
    _lead_on(schema, deepest)
    # Within a circle of schemas, which may hold itself, every one is met once.
    circles = networkx.condensation(ways)
    levels: dict[int, int] = {}
    for circle in reversed(list(networkx.topological_sort(circles))):
        own = sum(deepest[place] + 1 for place in circles.nodes[circle]["members"])
        levels[circle] = own + max(
            (levels[after] for after in circles.successors(circle)), default=0
        )
    if max(levels.values()) > _MOST_LEVELS:
        raise _refused(f"more than {_MOST_LEVELS} levels, references followed")


def _refused(why: str) -> UsageError:
    return UsageError(f"the schema cannot be used: {why}")


def _values(top: Any) -> Iterator[tuple[int, Any]]:
    """(level, object or array) of a schema and of all in it but data."""
    stack = [(0, top, False)]
    while stack:
        level, value, named = stack.pop()
        yield level, {} if named else value
        if isinstance(value, dict):
            inner = [(key, each) for key, each in value.items() if named or key not in _DATA]
            stack += [
                (level + 1, each, key in _NAMED and not named)
                for key, each in inner
                if isinstance(each, dict | list)
            ]
        else:
            stack += [(level + 1, each, False) for each in value if isinstance(each, dict | list)]


def _target(schema: dict[str, Any], reference: str) -> Any:
    """What a reference points at: an object or an array."""
    if reference != "#" and not reference.startswith("#/"):
        raise _refused(f"$ref {reference[:80]!r} is no way within it, as #/$defs/name")
    value: Any = schema
    for step in unquote(reference).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list):
            numbers = {str(number): each for number, each in enumerate(value)}
            value = numbers.get(step)
        else:
            value = value.get(step) if isinstance(value, dict) else None
    if isinstance(value, bool):  # a schema that holds for all or for nothing
        return {}
    if not isinstance(value, dict | list):
        raise _refused(f"$ref {reference[:80]!r} leads nowhere")
    return value


def _lead_on(schema: dict[str, Any], references: Iterable[str]) -> None:
    """Refuse a reference to a reference to a reference ... to itself."""
    known = set[str]()
    for reference in references:
        here: Any = reference
        way = set[str]()
        while isinstance(here, str) and here not in known:
            if here in way:
                raise _refused(f"$ref {here[:80]!r} leads back to itself")
            way.add(here)
            part = _target(schema, here)
            here = part.get("$ref") if isinstance(part, dict) else None
        known |= way
