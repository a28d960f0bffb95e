"""How the fuzzer of readers changes files: bytes of any, values of those that are JSON."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_LEAVES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 31, 32, 64, 127, 128, 255, 1 << 31, 1 << 32, 1 << 63,
    1 << 70, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), "", "a", "\n", "re:(", "re:.*",
    "re:(a+)+$", "*", "Linear", "F32", "I32", "F8_E8M0", "group", "é\ud800", [], {}, [[]], [0],
    [128, 128], {"a": {}}, "x" * 3000,
]  # fmt: skip
_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)


def changed(rng: random.Random, data: bytes, others: list[bytes], name: str) -> bytes:
    """`data` with a few changes, parts of `others` among them; what kind of file it is tells the
    end of its `name`.
    """
    for _ in range(rng.choice((1, 1, 2, 4))):
        if name.endswith(".json") and rng.random() < 0.8:
            data = _json(rng, data, others)
        elif name.endswith(".safetensors") and rng.random() < 0.8:
            data = _shard(rng, data, others)
        else:
            data = _bytes(rng, data, rng.choice(others))
    return data


def _bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    found = bytearray(data)
    at = rng.randrange(len(found) + 1)
    size = min(int(2 ** rng.uniform(0, 8)), len(found))
    match rng.randrange(6):
        case 0 if found:
            found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
        case 1:
            width = rng.choice((1, 4, 8))
            number = rng.choice(_NUMBERS) + rng.randrange(-2, 3)
            found[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
        case 2:
            del found[at : at + size]
        case 3:
            begin = rng.randrange(len(other) + 1)
            found[at:at] = other[begin : begin + size]
        case 4:
            begin = rng.randrange(len(found) + 1)
            found[at : at + size] = found[begin : begin + size]
        case 5 if rng.random() < 0.1:
            del found[at:]
    return bytes(found)


def _shard(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """The header of a shard changed, its length right again."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    parts = [each[8 : 8 + int.from_bytes(each[:8], "little")] for each in others[:64]]
    header = _json(rng, header, parts)
    if rng.random() < 0.1:
        rest = rest[: rng.randrange(len(rest) + 1)] + bytes(rng.randrange(64))
    return len(header).to_bytes(8, "little") + header + rest


def _json(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    try:
        value, other = json.loads(data), json.loads(rng.choice(others))
    except (ValueError, RecursionError):
        return _bytes(rng, data, rng.choice(others))
    places = list(_places(value))
    if not places:
        return _bytes(rng, data, rng.choice(others))
    holder, key = rng.choice(places)
    theirs = [each[at] for each, at in _places(other)]
    match rng.randrange(8):
        case 0 | 1 | 2:
            holder[key] = copy.deepcopy(rng.choice(_LEAVES))
        case 3:
            del holder[key]
        case 4 if theirs:
            holder[key] = copy.deepcopy(rng.choice(theirs))
        case 5:
            holder[key] = copy.deepcopy(rng.choice(places)[0])
        case 6:
            number = holder[key]
            if type(number) is int:
                holder[key] = number + rng.choice((-1, 1, number, -number, 1 << 20))
            else:
                holder[key] = [number]
        case 7 if isinstance(holder, dict):
            place, theirs_key = rng.choice(list(_places(other)) or places)
            holder[str(theirs_key)] = copy.deepcopy(place[theirs_key])
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder of a value, and the key it is at."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    for key in keys:
        yield value, key
        yield from _places(value[key])
