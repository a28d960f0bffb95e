"""A SentencePiece model as tokenizer.json has it: BPE over text as it is, which is what models have
been published with that have no tokenizer.json; others are refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hmc.checkpoint.gguf import sentence_piece
from hmc.errors import TokenizerError

Json = dict[str, Any]
Fields = Iterator[tuple[int, Any]]

_PIECES, _TRAINING, _NORMAL_FORM = 1, 2, 3  # fields of the model
_TEXT, _SCORE, _KIND = 1, 2, 3  # of a piece
_MODEL_TYPE, _SUFFIX = 3, 24  # of the training
_TABLE, _PREFIX, _SQUEEZED, _ESCAPED = 2, 3, 4, 5  # of the normal form
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # kinds of pieces


def read_sentencepiece(path: Path, config: Mapping[str, Any]) -> Json:
    """What tokenizer.json would say of a model; `config` is what tokenizer_config.json says.

    Raises `TokenizerError` for a file that is none, and for one whose ids hmc would not give.
    """
    try:
        found = list(_fields(path.read_bytes()))
        pieces = [_piece(dict(_fields(value))) for number, value in found if number == _PIECES]
        training = dict(_fields(next((v for n, v in found if n == _TRAINING), b"")))
        form = dict(_fields(next((v for n, v in found if n == _NORMAL_FORM), b"")))
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise TokenizerError(f"{path}: no SentencePiece model: {error}") from error
    problem = ""
    if training.get(_MODEL_TYPE, 1) == _UNIGRAM:
        # Of 12,000 drawn texts one had other ids with `tokenizers`, which adds up scores in f64;
        # and there `<0x41>` as text is the byte.
        problem = "is a unigram model, whose scores are added up in f32: some texts had other ids"
    elif training.get(_MODEL_TYPE, 1) != _BPE or training.get(_SUFFIX):
        problem = "is no BPE of words with a space before them"
    elif form.get(_TABLE) or form.get(_SQUEEZED, 1) or not form.get(_ESCAPED, 1):
        problem = "changes texts before it cuts them"
    elif any(kind == _USER for _, _, kind in pieces):
        problem = "has pieces that it finds before all others"
    vocabulary = {text: number for number, (text, _, _) in enumerate(pieces)}
    if not pieces or len(vocabulary) != len(pieces):
        problem = "has no pieces, or one twice"
    if problem:
        raise TokenizerError(
            f"{path}: it {problem}: save the tokenizer as tokenizer.json with transformers"
        )
    prefix = bool(form.get(_PREFIX, 1))
    made = sentence_piece(pieces, vocabulary, prefix=prefix)
    if config.get("legacy") is False:  # then no space comes after a special token
        made["normalizer"] = None
        made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "split": False,
                                 "prepend_scheme": "first" if prefix else "never"}  # fmt: skip
    decoder = config.get("added_tokens_decoder") or {}
    named = {int(number): each for number, each in decoder.items()}
    for number, (text, _, kind) in enumerate(pieces):
        if kind in (_UNKNOWN, _CONTROL):
            named.setdefault(number, {"content": text})
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {**plain, "id": number, "content": each["content"], "special": each.get("special", True)}
        for number, each in sorted(named.items())
    ]
    return {**made, "added_tokens": added}


def _piece(fields: Mapping[int, Any]) -> tuple[str, float, int]:
    score = struct.unpack("<f", fields[_SCORE])[0] if _SCORE in fields else 0.0
    return fields.get(_TEXT, b"").decode(), score, fields.get(_KIND, 1)


def _fields(data: bytes) -> Fields:
    """(number, value) of a message of protocol buffers: whole numbers, else bytes."""
    at = 0
    while at < len(data):
        key, at = _whole(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value: Any
            value, at = _whole(data, at)
        else:
            length, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _whole(data, at)
            if wire not in (1, 2, 5) or at + length > len(data):
                raise ValueError(f"a field of kind {wire} does not end")
            value, at = data[at : at + length], at + length
        yield number, value


def _whole(data: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
