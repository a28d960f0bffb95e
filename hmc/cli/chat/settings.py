"""How answers are drawn, as `/set` shows and changes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hmc.errors import UsageError

_SWITCHES = {"on": True, "off": False}


def _switch(word: str) -> bool:
    return _SWITCHES[word]


def _texts(words: str) -> list[str]:
    return [words]


KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "draw from so many of the likeliest tokens"),
    "top_p": (float, "draw from the likeliest tokens of so much probability"),
    "min_p": (float, "draw from tokens of so much of the likeliest one's probability"),
    "repetition_penalty": (float, "above 1: against repetition"),
    "seed": (int, "same seed, same tokens"),
    "max_new_tokens": (int, "of one answer"),
    "stop": (_texts, "end before this text"),
    "thinking": (_switch, "on or off, for chat templates that know enable_thinking"),
}
"""What can be set: how it is read, and what it means."""


def changed(options: Mapping[str, Any], argument: str) -> dict[str, Any]:
    """`options` after `/set NAME VALUE`; without a value the model's own counts again.

    Raises `UsageError` for a name or a value that there is not; whether a number is in range is
    for `sampling_params` to say.
    """
    name, _, word = argument.partition(" ")
    if name not in KINDS:
        raise UsageError(f"/set: no setting {name!r}: there are {', '.join(KINDS)}")
    read, meaning = KINDS[name]
    result = {key: value for key, value in options.items() if key != name}
    if word.strip():
        try:
            result[name] = read(word.strip())
        except (ValueError, KeyError):
            raise UsageError(f"/set {name} {word.strip()}: not a value ({meaning})") from None
    return result


def shown(options: Mapping[str, Any]) -> str:
    """All settings, a line each."""
    lines = []
    for name, (_, meaning) in KINDS.items():
        value = options.get(name)
        word = "-" if value is None else value[0] if name == "stop" and value else str(value)
        lines.append(f"{name:<20} {word!s:<10} {meaning}")
    return "\n".join(lines)
