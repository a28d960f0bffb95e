"""The tokenizer that a GGUF file's metadata hold, in the form that checkpoints have it beside their
weights: tokenizer.json and what stands in tokenizer_config.json and generation_config.json.

Three kinds are read, as llama.cpp calls them: "gpt2", byte-level BPE with merges, whose words are
cut as `splitting` says; "llama", SentencePiece BPE, whose merges follow from the tokens' scores,
spaces as U+2581 and unknown characters as byte tokens; and "gemma4", the same with merges of its
own (Sarvam's is called "gpt2", with words that are cut as "sarvam-moe").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.gguf.header import read_gguf
from hmc.checkpoint.gguf.splitting import SPLITTINGS
from hmc.checkpoint.jsonfile import quote
from hmc.errors import TokenizerError

Json = dict[str, Any]

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep"}
"""Special tokens by the names of their keys, the last of which is misspelt in files too."""
_ENDS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
     "<|eom_id|>", "<EOT>", "_<EOT>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
     "<turn|>", "<|tool_response>", "[EOT]", "[EOS]",
     "<|return|>", "<|call|>", "<|flush|>", "<|calls|>")
)  # fmt: skip
"""Tokens that end an answer wherever they are, though files name one of them alone."""
_CALLS = frozenset(("<|return|>", "<|call|>", "<|flush|>", "<|calls|>"))
"""Beside these, <|end|> ends a message, and no answer."""
_CHARACTERS = ("gemma4", "sarvam-moe")
"""Ways to cut words that are none: tokens are of characters, not of bytes."""
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "penalty_repeat": "repetition_penalty"}  # fmt: skip


@dataclass(frozen=True)
class GgufTokenizer:
    """`tokenizer` as tokenizer.json is, None where the file has no vocabulary; `config` and
    `generation` as the two files beside it.
    """

    tokenizer: Json | None
    config: Json = field(default_factory=dict)
    generation: Json = field(default_factory=dict)


def read_tokenizer(path: Path) -> GgufTokenizer:
    """The tokenizer of a GGUF file, or of a split one by its first part.

    Raises `TokenizerError` for a kind that is not read, and for a vocabulary that is none;
    `ShardError` for a damaged file.
    """
    settings = read_gguf(path).settings
    generation = {"eos_token_id": list(end_ids(settings)), **_sampling(settings)}
    if _KEY + "tokens" not in settings:
        return GgufTokenizer(None, {}, generation)
    kind = settings.get_str(_KEY + "model", "")
    if kind not in _KINDS:
        raise TokenizerError(f"{path}: {_KEY}model is {quote(kind)}; hmc reads {', '.join(_KINDS)}")
    tokens = _Tokens(settings)
    made, begins, ends = _KINDS[kind](tokens)
    config: Json = {
        "add_bos_token": settings.get_bool(_KEY + "add_bos_token", begins),
        "add_eos_token": settings.get_bool(_KEY + "add_eos_token", ends),
    }
    for key, name in _NAMES.items():
        number = settings.get_int(f"{_KEY}{key}_token_id", -1)
        if 0 <= number < len(tokens.texts):
            config[f"{name}_token"] = tokens.texts[number]
    if "tokenizer.chat_template" in settings:
        config["chat_template"] = settings.get_str("tokenizer.chat_template", "")
    return GgufTokenizer({**made, "added_tokens": tokens.added()}, config, generation)


def end_ids(settings: ModelConfig) -> tuple[int, ...]:
    """Ids of the tokens that end an answer, the file's own first."""
    named = [settings.get_int(f"{_KEY}{key}_token_id", -1) for key in ("eos", "eot", "eom")]
    texts, kinds = settings.get_strs(_KEY + "tokens"), _numbers(settings, "token_type")
    known = [
        number
        for number, (text, kind) in enumerate(zip(texts, kinds, strict=False))
        if kind in (_CONTROL, _USER) and text in _ENDS
    ]
    if any(texts[number] in _CALLS for number in known):
        known = [number for number in known if texts[number] != "<|end|>"]
    return tuple(dict.fromkeys(each for each in (*named, *known) if each >= 0))


class _Tokens:
    """The texts and kinds of all tokens."""

    def __init__(self, settings: ModelConfig) -> None:
        self.settings, self.path = settings, settings.path
        self.texts = settings.get_strs(_KEY + "tokens")
        self.kinds = _numbers(settings, "token_type") or [_NORMAL] * len(self.texts)
        if len(self.kinds) != len(self.texts):
            raise self.wrong(f"has {len(self.texts)} tokens and {len(self.kinds)} token types")

    def vocabulary(self) -> dict[str, int]:
        """Ids by text, of all tokens that are in use."""
        found: dict[str, int] = {}
        for number, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True)):
            if kind != _UNUSED and found.setdefault(text, number) != number:
                raise self.wrong(f"token {quote(text)} stands there twice")
        return found

    def added(self) -> list[Json]:
        """Tokens that are found in a text before anything else, and those of them that are left
        out of texts.
        """
        return [
            {"id": number, "content": text, "special": kind != _USER, "single_word": False,
             "lstrip": False, "rstrip": False, "normalized": False}
            for number, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER) and text
        ]  # fmt: skip

    def merges(self) -> list[tuple[str, ...]]:
        """Pairs of tokens, the first that are merged first."""
        found = [tuple(merge.split(" ")) for merge in self.settings.get_strs(_KEY + "merges")]
        for merge in found:
            if len(merge) != 2:
                raise self.wrong(f"{_KEY}merges: {quote(' '.join(merge))} is no pair")
        return found

    def wrong(self, problem: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: tokenizer: {problem}")


def _numbers(settings: ModelConfig, key: str) -> Sequence[Any]:
    """An array of numbers; () where there is none."""
    found = settings.values.get(_KEY + key, ())
    if not isinstance(found, memoryview | tuple):
        raise TokenizerError(f"{settings.path}: {_KEY}{key} is no array of numbers")
    return found


def _sampling(settings: ModelConfig) -> Json:
    found = {
        name: settings.get_float(f"general.sampling.{key}", 0.0)
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in settings
    }
    if "top_k" in found:
        found["top_k"] = int(found["top_k"])
    return {"do_sample": True, **found} if found else {}


def _byte_level(tokens: _Tokens) -> tuple[Json, bool, bool]:
    """tokenizer.json of byte-level BPE; whether texts begin and end with special tokens."""
    pre = tokens.settings.get_str(_KEY + "pre", "")
    if pre in _CHARACTERS:
        return _merged_characters(tokens)
    splitting = SPLITTINGS.get(pre)
    if splitting is None:
        raise TokenizerError(
            f"{tokens.path}: {_KEY}pre is {quote(pre)}: hmc does not know how this tokenizer cuts"
            f" words; it knows {', '.join((*SPLITTINGS, *_CHARACTERS))}"
        )
    bytes_as_characters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                           "use_regex": False}  # fmt: skip
    words = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in splitting.patterns
    ]
    made = _made(
        {"type": "NFC"} if splitting.composed else None,
        {"type": "Sequence", "pretokenizers": [*words, bytes_as_characters]},
        bytes_as_characters,
        {
            "vocab": tokens.vocabulary(),
            "merges": tokens.merges(),
            "ignore_merges": splitting.whole_words,
        },
    )
    return made, splitting.begins, False


def _sentence_piece(tokens: _Tokens) -> tuple[Json, bool, bool]:
    """tokenizer.json of SentencePiece BPE; whether texts begin and end with special tokens."""
    scores = _numbers(tokens.settings, "scores")
    if len(scores) != len(tokens.texts):
        raise tokens.wrong(f"has {len(tokens.texts)} tokens and {len(scores)} scores")
    prefix = tokens.settings.get_bool(_KEY + "add_space_prefix", True)
    pieces = list(zip(tokens.texts, scores, tokens.kinds, strict=True))
    return sentence_piece(pieces, tokens.vocabulary(), prefix=prefix), True, False


def _merged_characters(tokens: _Tokens) -> tuple[Json, bool, bool]:
    """tokenizer.json of BPE of characters whose merges the file has; whether texts begin and end
    with special tokens.
    """
    prefix = tokens.settings.get_bool(_KEY + "add_space_prefix", False)
    kinds = list(zip(tokens.texts, tokens.kinds, strict=True))
    made = _of_characters(kinds, tokens.vocabulary(), tokens.merges(), prefix)
    return made, tokens.settings.get_str(_KEY + "model", "") == "gemma4", False


def sentence_piece(
    pieces: Sequence[tuple[str, float, int]], vocabulary: Mapping[str, int], *, prefix: bool
) -> Json:
    """tokenizer.json of SentencePiece BPE without its added tokens, of pieces (text, score, kind)
    in the order of ids; `prefix`: a text begins with a space.
    """
    kinds = [(text, kind) for text, _, kind in pieces]
    return _of_characters(kinds, vocabulary, _merges(pieces, vocabulary), prefix)


def _of_characters(
    pieces: Sequence[tuple[str, int]],
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    prefix: bool,
) -> Json:
    """Of pieces (text, kind). Spaces are U+2581, with `prefix` one stands before a text; bytes
    stand for characters that are no tokens.
    """
    unknown = next((text for text, kind in pieces if kind == _UNKNOWN), None)
    begin = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return _made(
        {"type": "Sequence", "normalizers": [*begin, spaces]},
        None,
        {"type": "Sequence",
         "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        {"vocab": vocabulary, "merges": merges, "unk_token": unknown, "fuse_unk": True,
         "byte_fallback": any(kind == _BYTE for _, kind in pieces), "ignore_merges": False},
    )  # fmt: skip


def _merges(
    pieces: Sequence[tuple[str, float, int]], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every pair of tokens that makes one, the best-scored result first; of those of one result the
    longer left part first, as transformers orders them (convert_slow_tokenizer.py).
    """
    found = [
        (score, len(text[:cut]), text[:cut], text[cut:])
        for text, score, kind in pieces
        if kind == _NORMAL
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    found.sort(key=lambda each: (-each[0], -each[1]))
    return [(left, right) for _, _, left, right in found]


_KINDS = {"gpt2": _byte_level, "llama": _sentence_piece, "gemma4": _merged_characters}


def _made(normalizer: Json | None, words: Json | None, decoder: Json, model: Json) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": normalizer,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            **model,
        },
    }
