"""A vocabulary of tiktoken's gives the ids that tiktoken gives."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex

from hmc.errors import TokenizerError
from hmc.runtime.tokens.longest import most_bytes
from hmc.runtime.tokens.text import Text

LOADER = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
HAN = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}--\p{Han}]"
LOW = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}--\p{Han}]"
TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
WORDS = regex.compile(
    rf"\p{{Han}}+|{BEFORE}{HAN}*{LOW}+{TAIL}|{BEFORE}{HAN}+{LOW}*{TAIL}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    regex.V1,
)
SAMPLE = (
    "The quick brown fox's  dens,   don't 12345!!\n\n  \u4f60\u597d\u4e16\u754c English"
    "\u65e5\u672c gr\u00fc\u00df \U0001f642====----    "
)


def _learned() -> dict[bytes, int]:
    """A vocabulary of byte pairs: every byte, then unions of neighbours in the order in which a
    seeded draw finds them.
    """
    draw = random.Random(7)
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [word.encode() for word in WORDS.findall(SAMPLE * 3)]
    for _ in range(600):
        word = draw.choice(words)
        parts = _merged(word, ranks)
        if len(parts) > 1:
            at = draw.randrange(len(parts) - 1)
            ranks.setdefault(parts[at] + parts[at + 1], len(ranks))
    return ranks


def _merged(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's way: a word that is a token, else the neighbours of the lowest rank joined, the
    first of them, until none is left.
    """
    if word in ranks:
        return [word]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks.get(a + b, 1 << 30), at) for at, (a, b) in enumerate(pairwise(parts))]
        best, at = min(pairs, default=(1 << 30, 0))
        if best == 1 << 30:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return _learned()


def _written(folder: Path, ranks: dict[bytes, int], **config: Any) -> Path:
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for word, rank in ranks.items()]
    (folder / "tiktoken.model").write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_ids_are_those_of_tiktoken(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    first = len(ranks)
    named = {
        str(first + 1): {"content": "<|im_end|>"},
        str(first + 4): {"content": "<tool>", "special": False},
    }
    folder = _written(
        tmp_path, ranks, auto_map=LOADER, added_tokens_decoder=named, eos_token="<|im_end|>"
    )
    text = Text.open(folder, 100)
    assert text is not None and text.eos_token_ids == (first + 1,)
    draw = random.Random(3)
    pieces = [*SAMPLE.split(" "), " ", "  ", "=", "-", "\n", "\u4f60", "A", "'S"]
    for _ in range(400):
        content = "".join(draw.choice(pieces) for _ in range(draw.randrange(9)))
        words = [word.encode() for word in WORDS.findall(content)]
        expected = [ranks[part] for word in words for part in _merged(word, ranks)]
        assert text.encode(content, special=False) == expected, content
        assert text.decode(expected) == content
    ids = text.encode(f"a<|im_end|><tool><|reserved_token_{first}|>", special=False)
    assert ids == [ranks[b"a"], first + 1, first + 4, first]
    assert text.decode(ids) == "a<tool>"
    assert most_bytes(json.loads(text._tokenizer.to_str())) is not None


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (None, {}, "its tokenizer cuts words is not known: put a tokenizer.json"),
        (None, {"auto_map": {"AutoTokenizer": ["tokenization_x.X"]}}, "how tokenization_x.X cuts"),
        ("!!! 3", {"auto_map": LOADER}, "no vocabulary of tiktoken"),
        ("YWI= 900", {"auto_map": LOADER}, "not every byte and rank"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    tmp_path: Path, ranks: dict[bytes, int], change: str | None, config: Any, said: str
) -> None:
    path = _written(tmp_path, ranks, **config) / "tiktoken.model"
    path.write_text(path.read_text() + (f"{change}\n" if change else ""))
    with pytest.raises(TokenizerError, match=r"tiktoken\.model") as found:
        Text.open(tmp_path)
    assert said in str(found.value) and "\n" not in str(found.value)


def test_another_kind_of_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "hy.tiktoken").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"hy\.tiktoken: hmc reads tokenizer\.json, tiktoken"):
        Text.open(tmp_path)
