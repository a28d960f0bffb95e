"""Control tokens that users write stay text: only a chat template's own become tokens.

A control token is one that the tokenizer calls special, or an added one that the template writes
too (`<tool_call>`, `<think>`). Where one stands in what users send (contents, tools, arguments,
results, names), a mark is put into it before the template is rendered. Those that come out whole
are the template's own: they are given other names, which nobody else can write, the marks are taken
out, and a second tokenizer, the same but for these names, encodes the text. So all that is left of
a user's control token are its letters, cut as any letters are, and all else has the ids that it
always has.

What an assistant said before keeps added tokens that are not special: `<think>` in an answer that
is sent back was a token when the model wrote it.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from hmc.errors import TokenizerError, UsageError
from hmc.runtime.tokens.chat import ChatTemplate

Messages = Sequence[dict[str, Any]]

_MARKS = [chr(code) for code in (*range(0x12000, 0x12399), *range(0x13000, 0x13430))]
"""Signs of cuneiform and hieroglyphs; one that the conversation does not have is its mark. They are
letters without case: no way to write a text escapes or changes them, as `repr` does those of no
script."""
_NAME = "".join(chr(0xFDE0 + secrets.randbelow(16)) for _ in range(24))
"""What the names of the template's own control tokens begin with, in this process."""
_SAID = ("content", "reasoning_content", "reasoning", "thinking")
_SHORTEST_PART = 2  # characters that count as a beginning or an end of a control token


class Control:
    """The control tokens of one tokenizer and template; for any thread."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat: ChatTemplate) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        added = [t for t in tokenizer.get_added_tokens_decoder().values() if len(t.content) > 1]
        special = {token.content for token in added if token.special}
        written = {t.content for t in added if t.content in chat.literals and t.content.strip()}
        self._all, self._special = _Found(special | written), _Found(special)
        self._named: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()

    def rendered(
        self, messages: Messages, how: Mapping[str, Any]
    ) -> tuple[str, tokenizers.Tokenizer] | None:
        """The prompt text of a conversation in which users write control tokens, and the tokenizer
        for it; None where they do not. `how` is for `ChatTemplate.render`, whose errors it raises.
        """
        given = {name: how.get(name) for name in ("tools", "variables")}
        texts = list(_texts([messages, given]))
        if not any(self._all.near(text) for text in texts):
            return None
        used = set().union(*texts)
        mark = next((each for each in _MARKS if each not in used), None)
        if mark is None:
            raise UsageError(
                "one sign of cuneiform or hieroglyphs has to be left out of a conversation"
            )
        marked = {name: _changed(value, self._all.marking(mark)) for name, value in given.items()}
        text = self._chat.render(
            [self._message(each, mark) for each in messages], **{**how, **marked}, mark=mark
        )
        return self._all.whole(text, _NAME).replace(mark, ""), self._tokenizer_of_names()

    def _message(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        every, special = self._all.marking(mark), self._special.marking(mark)
        said = _SAID if message.get("role") == "assistant" else ()
        return {
            name: _changed(value, special if name in said else every)
            for name, value in message.items()
        }

    def _tokenizer_of_names(self) -> tokenizers.Tokenizer:
        """Made when it is first needed: that takes a second, and as much memory as the other."""
        with self._lock:
            if self._named is None:
                self._named = _renamed(self._tokenizer, self._all.texts, _NAME)
            return self._named


class _Found:
    """A set of texts, to be found in others."""

    def __init__(self, texts: set[str]) -> None:
        self.texts = texts
        longest_first = sorted(texts, key=len, reverse=True)
        self._regex = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        lengths = range(_SHORTEST_PART, max(map(len, texts), default=0))
        self._begins = {text[:n] for text in texts for n in lengths if n < len(text)}
        self._ends = {text[-n:] for text in texts for n in lengths if n < len(text)}
        self._lengths = lengths[::-1]

    def near(self, text: str) -> bool:
        """Whether one of them stands in a text, or may where the text is joined to others."""
        return bool(self._regex.search(text) or self._tail(text) or self._head(text))

    def marking(self, mark: str) -> Callable[[str], str]:
        """Puts a mark into each of them, and where the text's ends may become one."""

        def marked(text: str) -> str:
            if length := self._tail(text):
                at = len(text.rstrip()) - length + 1
                text = text[:at] + mark + text[at:]
            if self._head(text):
                at = len(text) - len(text.lstrip())
                text = text[:at] + mark + text[at:]
            return self._regex.sub(lambda found: found[0][0] + mark + found[0][1:], text)

        return marked

    def whole(self, text: str, name: str) -> str:
        """`text` with `name` before each of them."""
        return self._regex.sub(lambda found: name + found[0], text)

    def _tail(self, text: str) -> int:
        """How many characters at the end of a text begin one of them."""
        text = text.rstrip()
        return next((n for n in self._lengths if text[-n:] in self._begins), 0)

    def _head(self, text: str) -> int:
        """How many characters at the start of a text end one of them."""
        text = text.lstrip()
        return next((n for n in self._lengths if text[:n] in self._ends), 0)


def _texts(value: Any) -> Iterator[str]:
    """All texts within plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(each, change) for each in value]
    return value


def _renamed(tokenizer: tokenizers.Tokenizer, texts: set[str], name: str) -> tokenizers.Tokenizer:
    """A tokenizer in which these tokens are called by their texts with `name` before them.

    Raises `TokenizerError` when it does not give them the same ids.
    """
    described = json.loads(tokenizer.to_str())
    model = described["model"]
    for token in described["added_tokens"]:
        if token["content"] in texts:
            token["content"] = name + token["content"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {
            name + text if text in texts else text: number
            for text, number in model["vocab"].items()
        }
    else:  # of Unigram: [text, score] each
        model["vocab"] = [
            [name + text if text in texts else text, score] for text, score in model["vocab"]
        ]
    if model.get("merges"):
        model["merges"] = [
            merge for merge in model["merges"] if not texts.intersection((*merge, "".join(merge)))
        ]
    if model.get("unk_token") in texts:
        model["unk_token"] = name + model["unk_token"]
    try:
        found = tokenizers.Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # the library raises bare Exception for everything
        raise TokenizerError(f"control tokens cannot be told from text: {error}") from error
    if any(found.token_to_id(name + each) != tokenizer.token_to_id(each) for each in texts):
        raise TokenizerError("control tokens cannot be told from text: their ids change")
    return found
