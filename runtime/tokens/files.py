"""A checkpoint's tokenizer as it is stored: tokenizer.json and its siblings in a model directory,
or what a vocabulary of tiktoken's, a SentencePiece model or the metadata of a GGUF file say
instead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from hmc.checkpoint.gguf import read_tokenizer
from hmc.checkpoint.location import is_gguf
from hmc.errors import TokenizerError
from hmc.runtime.tokens.sentencepiece import read_sentencepiece
from hmc.runtime.tokens.tiktoken import read_tiktoken

_READERS = {"tiktoken.model": read_tiktoken, "tokenizer.model": read_sentencepiece}
"""Files that stand for a tokenizer.json where there is none."""


@dataclass(frozen=True)
class TokenizerFiles:
    """`described` is tokenizer.json as text, `config` what tokenizer_config.json says, `generation`
    generation_config.json, `template` that of chats ("" without one), each beside the file that
    an error about it names. `ends` are ids of tokens that end an answer, by config.json and
    generation_config.json.
    """

    path: Path
    described: str
    config: dict[str, Any]
    generation: dict[str, Any]
    template: str
    template_path: Path
    ends: tuple[int, ...]

    @staticmethod
    def read(location: Path) -> TokenizerFiles | None:
        """Of a model directory or a GGUF file; None where the checkpoint has no tokenizer.

        Raises `TokenizerError` naming the file that cannot be read.
        """
        if is_gguf(location):
            return _of_gguf(location)
        if (path := _stored(location)) is None:
            return None
        special = read_json(location / "special_tokens_map.json")
        config = {**special, **read_json(location / "tokenizer_config.json")}
        generation = read_json(location / "generation_config.json")
        template, template_path = _template(location, config)
        ends = (*_ends(location / "generation_config.json"), *_ends(location / "config.json"))
        reader = _READERS.get(path.name)
        described = json.dumps(reader(path, config)) if reader else _text(path)
        return TokenizerFiles(path, described, config, generation, template, template_path, ends)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer itself, which cuts nothing off and fills nothing up: settings of training
        that some files keep.
        """
        try:
            found = tokenizers.Tokenizer.from_str(self.described)
        except Exception as error:  # the library raises bare Exception for everything
            raise TokenizerError(f"{self.path}: not a readable tokenizer: {error}") from error
        found.no_truncation()
        found.no_padding()
        return found


def _stored(directory: Path) -> Path | None:
    """The file that holds a directory's tokenizer; None where it has none.

    Raises `TokenizerError` for one of a kind that is not read.
    """
    for name in ("tokenizer.json", *_READERS):
        if (directory / name).is_file():
            return directory / name
    for path in sorted(directory.glob("*.tiktoken")):
        raise TokenizerError(
            f"{path}: hmc reads tokenizer.json, {' and '.join(_READERS)}: save the tokenizer as"
            " tokenizer.json with transformers"
        )
    return None


def _of_gguf(path: Path) -> TokenizerFiles | None:
    found = read_tokenizer(path)
    if found.tokenizer is None:
        return None
    described = json.dumps(found.tokenizer)
    template, ends = found.config.get("chat_template", ""), found.generation["eos_token_id"]
    return TokenizerFiles(
        path, described, found.config, found.generation, template, path, tuple(ends)
    )


def _template(directory: Path, config: dict[str, Any]) -> tuple[str, Path]:
    """The template of chat_template.jinja, else of tokenizer_config.json (its "default" if it has
    several).
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _text(path), path
    value, path = config.get("chat_template"), directory / "tokenizer_config.json"
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value}
        value = named.get("default", next(iter(named.values()), None))
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{path}: chat_template is neither a text nor a list of them")
    return value or "", path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error


def _ends(path: Path) -> tuple[int, ...]:
    """The ids that a file names as ends, its part about the text included; () where it names none.

    Raises `TokenizerError` for what is no id.
    """
    whole = read_json(path)
    inner = whole.get("text_config")
    found: list[Any] = []
    for config in (whole, inner if isinstance(inner, dict) else {}):
        value = config.get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    for each in found:
        if isinstance(each, bool) or not isinstance(each, int) or each < 0:
            raise TokenizerError(f"{path}: eos_token_id {json.dumps(each)} is no token id")
    return tuple(found)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} when the file is absent; `TokenizerError` when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: not a JSON object")
    return value
