"""A vocabulary of tiktoken's as tokenizer.json has it: byte pairs with their ranks, a line each,
and beside them code that says how words are cut. That code is not run: it is known by its name.

tiktoken joins the neighbours whose union has the lowest rank; here every pair of tokens that makes
one is a merge, in the order of ranks, which is the same.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmc.checkpoint.gguf.splitting import SPLITTINGS
from hmc.errors import TokenizerError

Json = dict[str, Any]

_KNOWN = {"tokenization_kimi.TikTokenTokenizer": "kimi-k2"}
"""By what tokenizer_config.json says loads the tokenizer: how it cuts words (`SPLITTINGS`)."""
_RESERVED = 258  # ids after those of the vocabulary that are tokens, named or not


def read_tiktoken(path: Path, config: Mapping[str, Any]) -> Json:
    """What tokenizer.json would say of a vocabulary; `config` is what tokenizer_config.json says.

    Raises `TokenizerError` for a file that is none, and for a tokenizer that is not known.
    """
    loader = (config.get("auto_map") or {}).get("AutoTokenizer")
    loader = loader[0] if isinstance(loader, list) and loader else loader
    splitting = SPLITTINGS.get(_KNOWN.get(str(loader), ""))
    if splitting is None:
        raise TokenizerError(
            f"{path}: how {loader or 'its tokenizer'} cuts words is not known: put a tokenizer.json"
            " beside it"
        )
    letters, ranks = _letters(), _ranks(path)
    vocabulary = {"".join(letters[b] for b in word): rank for word, rank in ranks.items()}
    merges = [
        (rank, ranks[word[:cut]], word[:cut], word[cut:])
        for word, rank in ranks.items()
        for cut in range(1, len(word))
        if word[:cut] in ranks and word[cut:] in ranks
    ]
    merges.sort(key=lambda each: each[:2])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}  # fmt: skip
    words = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in splitting.patterns
    ]
    return {
        "version": "1.0",
        "added_tokens": _added(config, len(ranks)),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [
                ["".join(letters[b] for b in left), "".join(letters[b] for b in right)]
                for _, _, left, right in merges
            ],
            "ignore_merges": True,
        },
    }


def _ranks(path: Path) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                word, rank = line.split()
                found[base64.b64decode(word, validate=True)] = int(rank)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: no vocabulary of tiktoken: {error}") from error
    single = all(bytes([byte]) in found for byte in range(256))
    if sorted(found.values()) != list(range(len(found))) or not single or b"" in found:
        raise TokenizerError(f"{path}: no vocabulary of tiktoken: not every byte and rank is there")
    return found


def _added(config: Mapping[str, Any], first: int) -> list[Json]:
    """Tokens after the vocabulary, by the names that they have."""
    named = config.get("added_tokens_decoder") or {}
    found = []
    for number in range(first, first + _RESERVED):
        token = named.get(str(number)) or {"content": f"<|reserved_token_{number}|>"}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        special = token.get("special", True)
        found.append({"id": number, "content": token["content"], "special": special, **flags})
    return found


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(0x100 + place) for place, byte in enumerate(others)}
