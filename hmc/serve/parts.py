"""The parts of an answer in their order, thought, text, calls, and where each begins and ends: for
interfaces whose answers are lists of them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from hmc.serve.generate import News


@dataclass
class Part:
    """One part of an answer: `text` is what it says, of a call its arguments as JSON text. `cut`
    when the answer ends within it for want of room.
    """

    kind: Literal["thought", "text", "call"]
    number: int
    name: str = ""
    text: str = ""
    cut: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Step:
    """A part begins, says more (`text`) or ends."""

    what: Literal["begins", "more", "ends"]
    part: Part
    text: str = ""


class Parts:
    """Makes parts of news. Where calls may come, white space between them is no part."""

    def __init__(self, *, calls: bool) -> None:
        self.all: list[Part] = []
        self._calls = calls
        self._open = False
        self._held = ""

    def take(self, news: News) -> Iterator[Step]:
        """What happens with news; to be iterated to its end."""
        if news.thought:
            yield from self._more("thought", news.thought)
        text, self._held = self._held + news.text, ""
        if self._calls:
            sure = len(text.rstrip())
            text, self._held = text[:sure], text[sure:]
        if text:
            yield from self._more("text", text)
        for call in news.calls:
            self._held = ""
            yield from self._begin("call", call.name)
            yield from self._more("call", call.arguments)
            yield from self._end()
        if news.reason is not None:
            if self._held and not any(part.kind == "call" for part in self.all):
                yield from self._more("text", self._held)
            yield from self._end(cut=news.reason == "length")

    def _more(self, kind: Literal["thought", "text", "call"], text: str) -> Iterator[Step]:
        if not self._open or self.all[-1].kind != kind:
            yield from self._begin(kind)
        self.all[-1].text += text
        yield Step("more", self.all[-1], text)

    def _begin(self, kind: Literal["thought", "text", "call"], name: str = "") -> Iterator[Step]:
        yield from self._end()
        self.all.append(Part(kind, len(self.all), name))
        self._open = True
        yield Step("begins", self.all[-1])

    def _end(self, *, cut: bool = False) -> Iterator[Step]:
        if self._open:
            self._open = False
            self.all[-1].cut = cut
            yield Step("ends", self.all[-1])
