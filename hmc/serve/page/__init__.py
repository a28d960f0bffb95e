"""The page at `/`: index.html with its style and scripts in it, which is one answer of the server;
browsers run and load nothing else.

    dom.js       elements, with text as text
    markdown.js  answers as blocks, drawn while they come
    store.js     conversations in the browser
    live.js      the plan and the work under way
    answer.js    one request and its stream
    chat.js      turns: send, stop, edit, regenerate, copy
    main.js      what listens to what
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_SCRIPTS = ("dom", "markdown", "store", "live", "answer", "chat", "main")


def document() -> bytes:
    """The page."""
    return _document()[0]


def policy() -> str:
    """Its Content-Security-Policy, by which its own style and script are the only ones."""
    return _document()[1]


@cache
def _document() -> tuple[bytes, str]:
    style = _text("style.css")
    script = '"use strict";\n' + "\n".join(_text(f"{name}.js") for name in _SCRIPTS)
    page = _text("index.html").replace("<style></style>", f"<style>{style}</style>")
    page = page.replace("<script></script>", f"<script>{script}</script>")
    rules = (
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return page.encode(), "; ".join(rules)


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
