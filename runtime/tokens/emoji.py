"""Emoji that come in parts: a stream of text in which none is seen half.

A family, a flag, a tone of skin, a heart in colour are several characters, which tokens divide as
they like; a client that shows the first of them shows another emoji, or none. What may go on is
held back until the next piece tells, so an emoji comes one token late. (Letters with combining
marks are not: half of one is a letter.)
"""

from __future__ import annotations

import re

_LONGEST = 32
"""Characters of an emoji, beyond which it is given out as it is: the longest known has 14."""
_PICTURE = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u21ff\u2300-\u23ff\u24c2\u25a0-\u27bf\u2934"
    "\u2935\u2b00-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001f1e5\U0001f200-\U0001f3fa"
    "\U0001f400-\U0001faff"
)
_TONE, _FLAG, _TAG = "[\U0001f3fb-\U0001f3ff]", "[\U0001f1e6-\U0001f1ff]", "[\U000e0020-\U000e007f]"
_PART = f"(?:[{_PICTURE}](?:\ufe0f|{_TONE})?\u20e3?{_TAG}*|{_TONE})"
_UNENDED = re.compile(
    f"(?:{_PART}(?:\u200d{_PART})*\u200d?|(?<!{_FLAG})(?:{_FLAG}{_FLAG})*(?P<flag>{_FLAG})|[0-9#*]\ufe0f)\\Z"
)


class WholeEmoji:
    """Holds the end of a text back while it may be the beginning of an emoji."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain with `piece`; "" adds nothing."""
        if not piece:
            return ""
        text = self._held + piece
        found = _UNENDED.search(text, max(0, len(text) - _LONGEST))
        start = len(text) if found is None else found.start("flag" if found["flag"] else 0)
        self._held = text[start:] if len(text) - start < _LONGEST else ""
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        """What is held back, once no more text comes."""
        piece, self._held = self._held, ""
        return piece
