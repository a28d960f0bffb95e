"""What single tokens are in bytes and text, special ones included; hides how tokenizer.json spells
them.
"""

from __future__ import annotations

import json
from typing import Any

from hmc.runtime.tokens.files import TokenizerFiles


class Vocabulary:
    """The tokens of a checkpoint's tokenizer, one by one; `special` are the special ones' ids."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Raises `TokenizerError` when the tokenizer cannot be read."""
        self.described = files.described
        self._tokenizer = files.tokenizer()
        described: dict[str, Any] = json.loads(files.described)
        added = described.get("added_tokens") or ()
        self._added = {token["id"] for token in added}
        self.special = {token["content"]: token["id"] for token in added if token.get("special")}
        self._hidden = set(self.special.values())
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
        return token in self._hidden

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
