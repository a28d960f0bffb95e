"""Numbers as people read them."""

from __future__ import annotations

from dataclasses import dataclass

_LARGE = ("", "k", "M", "G", "T", "P")
_SMALL = ("", "m", "µ", "n", "p")
_DIGITS = 3


@dataclass(frozen=True)
class Tick:
    """A label at one coordinate of an axis."""

    at: float
    text: str


def si(value: float, unit: str) -> str:
    """`value` with an SI prefix: 1.5 GB, 46.1 ms, 820 GFLOP/s."""
    if value == 0:
        return f"0 {unit}"
    scaled, index = value, 0
    while abs(scaled) >= 999.5 and index < len(_LARGE) - 1:
        scaled, index = scaled / 1000, index + 1
    if index or abs(scaled) >= 1 or unit in ("B", "FLOP", "tokens"):
        return f"{number(scaled)} {_LARGE[index]}{unit}"
    while abs(scaled) < 1 and index < len(_SMALL) - 1:
        scaled, index = scaled * 1000, index + 1
    return f"{number(scaled)} {_SMALL[index]}{unit}"


def count(number: float) -> str:
    """A count in the unit that reads best: 671.03 B, 7.66 M."""
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"


def number(value: float) -> str:
    """A number of three digits, whole where it is larger, with thin spaces between thousands."""
    whole = len(str(int(abs(value))))
    places = max(0, _DIGITS - whole) if abs(value) >= 1 else _DIGITS
    text = f"{value:,.{places}f}".replace(",", " ")
    return text.rstrip("0").rstrip(".") if "." in text else text
