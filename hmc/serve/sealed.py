"""Thoughts that clients carry without reading them: what Anthropic's interface calls a signature
and OpenAI's encrypted content. Nothing is kept here, so the thought itself is in it.
"""

from __future__ import annotations

import base64

_MARK = "hmc1."


def seal(thought: str) -> str:
    """A thought as a line that no client takes apart."""
    return _MARK + base64.urlsafe_b64encode(thought.encode()).decode()


def opened(sealed: str | None) -> str:
    """The thought in a line that `seal` made; "" in any other, which only its maker can read."""
    if sealed is None or not sealed.startswith(_MARK):
        return ""
    try:
        return base64.urlsafe_b64decode(sealed[len(_MARK) :]).decode()
    except ValueError:
        return ""
