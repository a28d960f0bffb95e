"""What single tokens are in bytes and text, special ones included; hides how tokenizer.json spells
them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from hmc.errors import TokenizerError


class Vocabulary:
    """The tokens of a checkpoint's tokenizer, one by one."""

    def __init__(self, directory: Path) -> None:
        """Raises `TokenizerError` naming tokenizer.json when it cannot be read."""
        self.path = directory / "tokenizer.json"
        try:
            source = self.path.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(source)
            described: dict[str, Any] = json.loads(source)
        except Exception as error:  # the library raises bare Exception for everything
            raise TokenizerError(f"{self.path}: not a readable tokenizer: {error}") from error
        added = described.get("added_tokens") or ()
        self._added = {token["id"] for token in added}
        self._special = {token["id"] for token in added if token.get("special")}
        byte_level = "ByteLevel" in json.dumps(described.get("decoder"))
        self._bytes = _byte_characters() if byte_level else None

    def bytes(self, token: int) -> bytes:
        """The bytes of a token; b"" for an id that the tokenizer does not know."""
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self._added:
            return str(name).encode()
        if self._bytes is not None:
            return bytes(self._bytes[character] for character in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return str(name).replace("\u2581", " ").encode()

    def hidden(self, token: int) -> bool:
        """Whether a token is left out of texts."""
        return token in self._special

    def text(self, token: int) -> str:
        """The text of a token, with replacement characters where it is half a character."""
        return self.bytes(token).decode("utf-8", "replace")


def _byte_characters() -> dict[str, int]:
    """Which byte a character of a byte-level vocabulary stands for: printable Latin-1 stands for
    itself, the others follow from U+0100 on, in order (as GPT-2's vocabulary was written).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return table
