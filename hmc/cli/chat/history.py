"""What was typed before, in a file of the state folder: one JSON text a line, since a message may
have several lines.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from hmc.env import state_dir
from hmc.files import write_beside

MOST = 1000
"""Messages that are kept."""


class History:
    """The file; a conversation is nobody else's business, so only its owner may read it."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or state_dir() / "chat-history"

    def read(self) -> list[str]:
        """The messages, oldest first; lines that are none are left out."""
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        found = [text for line in lines if (text := _text(line))]
        if len(lines) > 2 * MOST:
            self._write(found[-MOST:])
        return found[-MOST:]

    def add(self, text: str) -> None:
        """Append one at once: a conversation may end in any way, and several may be under way."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(text) + "\n")

    def _write(self, texts: list[str]) -> None:
        write_beside(self._path, "".join(json.dumps(text) + "\n" for text in texts))
        self._path.chmod(0o600)


def _text(line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError:
        return ""
    return found if isinstance(found, str) else ""
