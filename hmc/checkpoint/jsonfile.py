"""Strict reading of the JSON objects of a checkpoint; hides every way such text can be broken.

Used for shard headers, the shard index and config.json alike: each names its own error class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hmc.errors import HmcError

_LONGEST_NAME = 120


class _DuplicateKeyError(ValueError):
    """One JSON object holds a key twice; `args[0]` is the key."""


def parse_object(data: bytes, where: str, error: type[HmcError]) -> dict[str, Any]:
    """The JSON object in `data`; `error`, naming `where`, if it is not exactly one valid object.

    Refused: text that is not UTF-8, invalid JSON, another JSON type, a key given twice in any
    object (readers disagree on which one counts), nesting deep enough to exhaust the parser.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 at byte {problem.start}") from None
    except _DuplicateKeyError as problem:
        raise error(f"{where}: {quote(problem.args[0])} stands there twice") from None
    except json.JSONDecodeError as problem:
        spot = f"line {problem.lineno} column {problem.colno}"
        raise error(f"{where}: not valid JSON: {problem.msg} at {spot}") from None
    except ValueError:  # an integer of thousands of digits
        raise error(f"{where}: not valid JSON: a number with too many digits") from None
    except RecursionError:
        raise error(f"{where}: not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise error(f"{where}: holds a JSON {_json_type(value)}, not an object")
    return value


def read_object(path: Path, error: type[HmcError]) -> dict[str, Any]:
    """`parse_object` of a small file that must exist."""
    return parse_object(read_bytes(path, error), str(path), error)


def read_bytes(path: Path, error: type[HmcError]) -> bytes:
    """The content of a small file; `error` if it is absent or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None


def quote(value: object) -> str:
    """`repr`, printable on one line and never longer than a line of a message should be."""
    text = repr(value)
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "..."


def first_few(names: list[str], most: int = 4) -> str:
    """The first names of a list and how many more there are: "a, b, c, d and 7 more"."""
    text = ", ".join(_readable(name) for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def _readable(name: str) -> str:
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else quote(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return table


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {list: "array", str: "string", bool: "boolean"}
    return names.get(type(value), "number")
