"""A SentencePiece model gives the ids that SentencePiece gives."""

from __future__ import annotations

import json
import random
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hmc.errors import TokenizerError
from hmc.runtime.tokens.text import Text

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SAMPLE = (
    "in the beginning was the word,  and the word was with God. 12  gr\u00fc\u00df \u65e5\u672c"
    " \U0001f642"
)
Piece = tuple[str, float, int]


def _number(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _message(*fields: tuple[int, Any]) -> bytes:
    """A message of protocol buffers."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += _number(number << 3) + _number(value)
        elif isinstance(value, float):
            out += _number(number << 3 | 5) + struct.pack("<f", value)
        else:
            out += _number(number << 3 | 2) + _number(len(value)) + value
    return out


def _written(
    folder: Path, pieces: list[Piece], kind: int = 2, form: Any = (), **config: Any
) -> Path:
    listed = [(1, _message((1, t.encode()), (2, score), (3, k))) for t, score, k in pieces]
    how = _message((1, b"identity"), (3, 1), (4, 0), *form)
    model = _message(*listed, (2, _message((3, kind))), (3, how))
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def pieces() -> list[Piece]:
    """Control pieces, every byte, unions of neighbours as a seeded draw finds them, letters."""
    draw, scores = random.Random(5), dict[str, float]()
    words = ["\u2581" + word for word in SAMPLE.split(" ")]
    letters = sorted({*"".join(words)} - set("\u00df\U0001f642"))
    known = dict.fromkeys(letters, 0.0)
    for _ in range(300):
        parts = _merged(draw.choice(words), known | scores)
        if len(parts) > 1:
            at = draw.randrange(len(parts) - 1)
            if {parts[at], parts[at + 1]} <= {*known, *scores}:
                scores.setdefault(parts[at] + parts[at + 1], -float(len(scores)))
    return [
        ("<unk>", 0.0, UNKNOWN),
        *((text, 0.0, CONTROL) for text in ("<s>", "</s>")),
        *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
        *((text, score, NORMAL) for text, score in scores.items()),
        *((text, -1000.0 - at, NORMAL) for at, text in enumerate(letters)),
    ]


def _merged(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's way: of neighbours whose union is a piece those with the best score are
    joined, the first of them, until none is left.
    """
    parts = list(text)
    while True:
        pairs = [
            (-scores[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores
        ]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _ids(text: str, pieces: list[Piece]) -> list[int]:
    number = {piece: at for at, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    found = []
    for part in _merged("\u2581" + text.replace(" ", "\u2581"), scores) if text else []:
        known = [part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()]
        found += [number[each] for each in known]
    return found


def test_ids_are_those_of_sentencepiece(tmp_path: Path, pieces: list[Piece]) -> None:
    added = {str(len(pieces)): {"content": "<|im_end|>", "special": True}}
    text = Text.open(_written(tmp_path, pieces, added_tokens_decoder=added, eos_token="</s>"), 99)
    assert text is not None and text.eos_token_ids == (2,)
    draw, words = random.Random(1), [*SAMPLE.split(" "), " ", "  ", "\n", "the", "z"]
    for _ in range(400):
        content = "".join(draw.choice(words) for _ in range(draw.randrange(9)))
        assert text.encode(content, special=False) == _ids(content, pieces), content
    assert text.encode("</s><|im_end|>", special=False) == [2, len(pieces)]
    assert text.decode(_ids(SAMPLE, pieces)) == SAMPLE


def test_whether_a_space_comes_after_a_special_token(tmp_path: Path, pieces: list[Piece]) -> None:
    word = [piece for piece, _, _ in pieces].index("w")
    for legacy, ids in ((False, [1, word]), (True, [1, *_ids("w", pieces)])):
        text = Text.open(_written(tmp_path, pieces, legacy=legacy))
        assert text is not None and text.encode("<s>w", special=False) == ids


@pytest.mark.parametrize(
    ("how", "more", "said"),
    [
        ({"kind": 1}, [], "is a unigram model"),
        ({"kind": 3}, [], "is no BPE"),
        ({"form": [(2, b"table")]}, [], "changes texts"),
        ({"form": [(4, 1)]}, [], "changes texts"),
        ({}, [("<mask>", 0.0, USER)], "has pieces that it finds before all others"),
        ({}, [("<s>", 0.0, CONTROL)], "or one twice"),
    ],
)
def test_what_would_have_other_ids_is_refused(
    tmp_path: Path, pieces: list[Piece], how: Any, more: list[Piece], said: str
) -> None:
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model: it .*{said}"):
        Text.open(_written(tmp_path, [*pieces, *more], **how))


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x0a\xff\x01a", b"\x0a\x02\x0a\x05", b"\x0b"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: (no SentencePiece model|it )"):
        Text.open(tmp_path)
