"""How much text one token can stand for, so that a text that is too long for a context is refused
unread: tokenising megabytes takes seconds.

That number exists where a tokenizer drops nothing and has a token for every byte: of byte-level BPE
each character of a token is a byte of text, of others (sentencepiece's, with byte tokens) the
token's own UTF-8 is at least as long as what it stands for. Normal forms shorten a text by no more
than a factor.
"""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers

_SHRINKS = {"NFC": 4, "NFD": 3, "Prepend": 1, "ByteLevel": 1}
"""How much shorter in UTF-8 these normalisers make a text at most: U+212A has three bytes and is K;
U+1FBE, U+0308 and U+0301 have seven and are U+0390, of two.
"""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPLITS = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "UnicodeScripts"}


def most_bytes(described: dict[str, Any]) -> int | None:
    """The UTF-8 bytes of text that one token of a tokenizer.json stands for at most; None where it
    has no such bound.
    """
    model = described.get("model") or {}
    normal, splits = _steps(described, "normalizer"), _steps(described, "pre_tokenizer")
    added = described.get("added_tokens") or []
    byte_level = any(step.get("type") == "ByteLevel" for step in (*normal, *splits))
    every = pre_tokenizers.ByteLevel.alphabet() if byte_level else _BYTES
    if (
        model.get("type") != "BPE"
        or not (byte_level or model.get("byte_fallback"))
        or not all(byte in model["vocab"] for byte in every)
        or any(step.get("behavior") == "Removed" for step in splits)
        or any(step.get("type") not in _SPLITS for step in splits)
        or any(token.get("lstrip") or token.get("rstrip") for token in added)
    ):
        return None
    factor = 1
    for step in normal:
        spaces = step.get("type") == "Replace" and step.get("pattern") == {"String": " "}
        spaces = spaces and bool(step.get("content"))
        if not spaces and step.get("type") not in _SHRINKS:
            return None
        factor *= 1 if spaces else _SHRINKS[step["type"]]
    longest = max((len(t) if byte_level else len(t.encode()) for t in model["vocab"]), default=0)
    return factor * max(longest, *(len(token["content"].encode()) for token in added), 1)


def _steps(described: dict[str, Any], name: str) -> list[dict[str, Any]]:
    step = described.get(name)
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return list(step.get("normalizers") or step.get("pretokenizers") or ())
    return [step]
