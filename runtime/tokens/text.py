"""Text to token ids and back: the checkpoint's tokenizer and its special tokens.

`Detokenizer` gives text out as tokens arrive and never half a character; `StopStrings` finds stop
strings wherever token boundaries fall. The chat template lives in runtime/tokens/chat.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from hmc.errors import ContextLengthError, UsageError
from hmc.runtime.tokens.chat import ChatTemplate
from hmc.runtime.tokens.control import Control
from hmc.runtime.tokens.files import TokenizerFiles
from hmc.runtime.tokens.longest import most_bytes

_CONTEXT_TOKENS = 5  # prompt tokens a detokeniser starts from, so that a leading space is kept
_LONGEST_HOLD = 16  # tokens that no character needs: beyond it the bytes held back are not UTF-8
_REPLACEMENT = "\ufffd"


class Text:
    """A checkpoint's tokenizer; `chat` is its template or None, `eos_token_ids` what ends an
    answer.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        config: dict[str, Any],
        chat: ChatTemplate | None,
        eos_token_ids: tuple[int, ...],
        generation_config: dict[str, Any],
        most_bytes: int | None = None,
    ) -> None:
        """A text of more than `most_bytes` is refused unread, where that is a number."""
        self._tokenizer = tokenizer
        self._config = config
        self.chat = chat
        self.eos_token_ids = eos_token_ids
        self.generation_config = generation_config
        self._most_bytes = most_bytes
        self._hidden: frozenset[int] | None = None  # None: all special tokens

    @staticmethod
    def open(location: Path, context: int | None = None) -> Text | None:
        """Of a model directory or a GGUF file; None when the checkpoint has no tokenizer. A text
        that must have more than `context` tokens is refused unread, where the tokenizer's longest
        token tells so.

        Raises `TokenizerError` naming the file that cannot be read.
        """
        files = TokenizerFiles.read(location)
        if files is None:
            return None
        tokens, origin = special_tokens(files.config), str(files.template_path)
        chat = ChatTemplate(files.template, tokens, origin) if files.template else None
        tokenizer, generation = files.tokenizer(), files.generation
        named = tokenizer.token_to_id(tokens.get("eos_token", ""))
        ends = tuple(dict.fromkeys((*files.ends, *(() if named is None else (named,)))))
        longest = None if context is None else most_bytes(json.loads(files.described))
        most = None if longest is None or context is None else longest * context
        return Text(tokenizer, files.config, chat, ends, generation, most)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, framed by BOS and EOS as the checkpoint's tokenizer
        does it.

        `add_bos_token` and `add_eos_token` of tokenizer_config.json replace the post-processor of
        tokenizer.json where they are given, as in transformers. Other threads run meanwhile.

        Raises `ContextLengthError` for a text of so many bytes that the context cannot hold it,
        `UsageError` for one with half a character (a lone surrogate).
        """
        if not special:
            return self._ids(text, self._tokenizer, special=False)
        flags = [self._config.get(f"add_{name}_token") for name in ("bos", "eos")]
        if flags == [None, None]:
            return self._ids(text, self._tokenizer, special=True)
        ids = self._ids(text, self._tokenizer, special=False)
        first = [self._special_id("bos_token")] if flags[0] else []
        last = [self._special_id("eos_token")] if flags[1] else []
        return [token for token in (*first, *ids, *last) if token is not None]

    def encode_chat(self, messages: Sequence[dict[str, Any]], **how: Any) -> list[int]:
        """Token ids of a conversation ({"role", "content"} each) in the checkpoint's chat form,
        ready to be answered; `how` is for `ChatTemplate.render`. Control tokens in what users write
        are encoded as the letters that they have.

        Raises `UsageError` when the checkpoint has no chat template, and what `render` raises.
        """
        if self.chat is None or self._control is None:
            raise UsageError("this checkpoint has no chat template: give a plain prompt instead")
        try:
            found = self._control.rendered(messages, how)
            text, tokenizer = found or (self.chat.render(messages, **how), self._tokenizer)
        except RecursionError as error:
            raise UsageError("the messages go too deep") from error
        return self._ids(text, tokenizer, special=False)

    @cached_property
    def _control(self) -> Control | None:
        return None if self.chat is None else Control(self._tokenizer, self.chat)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        if self._hidden is None:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        kept = [each for each in ids if each not in self._hidden]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def showing(self, markers: Iterable[str]) -> Text:
        """The same, but decoded texts have the special tokens of which these markers are made."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        shown = "\0".join(markers)
        hidden = [number for number, t in added if t.special and t.content not in shown]
        found = copy.copy(self)
        found._hidden = frozenset(hidden)
        return found

    def _ids(self, text: str, tokenizer: tokenizers.Tokenizer, *, special: bool) -> list[int]:
        most = self._most_bytes
        try:
            found = len(text.encode())
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            raise UsageError(f"the text has half a character, {half} at {error.start}") from error
        if most is not None and found > most:
            raise ContextLengthError(
                f"the text has {found} bytes, of which the plan's context holds {most} at the most:"
                " shorten it or compile with a larger --max-context"
            )
        # `encode` keeps other threads waiting, and finds offsets that nobody asks for.
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return list(encoding.ids)

    def _special_id(self, name: str) -> int | None:
        token = special_tokens(self._config).get(name)
        return None if token is None else self._tokenizer.token_to_id(token)


class Detokenizer:
    """Tokens in, text out that continues a prompt's; a character whose bytes are not all there is
    held back.

    Only a short window of tokens is decoded at each step: a tokenizer's decoder looks at neighbours
    (leading spaces, runs of byte tokens), so the window starts at the piece before the last, and
    `_given` counts its characters that are out already.
    """

    def __init__(self, text: Text, prompt_ids: Sequence[int] = ()) -> None:
        self._text = text
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._clean = len(self._window)  # tokens of the window whose text is complete
        self._given = len(text.decode(self._window).rstrip(_REPLACEMENT))

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is half there."""
        self._window.append(token)
        text = self._text.decode(self._window)
        if not text.endswith(_REPLACEMENT):
            piece = text[self._given :]
            # A window without text would lose the space that the next token begins with.
            self._slide(self._clean if piece else 0)
            return piece
        if len(self._window) - self._clean <= _LONGEST_HOLD:
            return ""
        final = len(text) - min(3, len(text) - len(text.rstrip(_REPLACEMENT)))
        piece = text[self._given : final]
        held = len(text) - final
        self._slide(len(self._window) - _LONGEST_HOLD // 2)
        self._given = max(self._given - held, 0)
        return piece

    def flush(self) -> str:
        """What is still held back, as replacement characters where bytes are missing; call once, at
        the end.
        """
        piece = self._text.decode(self._window)[self._given :]
        self._given += len(piece)
        return piece

    def _slide(self, start: int) -> None:
        self._window = self._window[start:]
        self._clean = len(self._window)
        self._given = len(self._text.decode(self._window))


class StopStrings:
    """Cuts a stream of text at the first stop string; holds back a tail that may be the start of
    one. `met` is the stop string that was found.
    """

    def __init__(self, stop: str | Sequence[str] | None) -> None:
        """Raises `UsageError` for an empty stop string."""
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(isinstance(text, str) and text for text in self._stops):
            raise UsageError("stop: a stop string must be a non-empty text")
        self._held = ""
        self.met: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to give out, and whether a stop string was met (it and all behind it
        are dropped).
        """
        self._held += text
        hits = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            at, self.met = min(hits)
            piece, self._held = self._held[:at], ""
            return piece, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece, False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        piece, self._held = self._held, ""
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on of a tokenizer_config.json, as text."""
    tokens = {}
    for name, value in config.items():
        if name.endswith("_token") and not name.startswith("add_"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
    return tokens
