"""The part of an answer that a model thinks aloud, set apart by the model's own markers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hmc.runtime.tokens.chat import ChatTemplate
from hmc.runtime.tokens.text import Text
from hmc.serve.forms import HARMONY
from hmc.serve.tools import tail


@dataclass(frozen=True)
class Markers:
    """What stands around a thought."""

    begin: str
    end: str

    @property
    def shown(self) -> tuple[str, ...]:
        """What an answer has to show, special tokens or not."""
        return (self.begin, self.end)

    def begun(self, prompt: str) -> bool:
        """Whether a prompt ends where a thought begins."""
        return prompt.rstrip().endswith(self.begin.rstrip())

    def closing(self, opening: str) -> str:
        """What ends a thought that a prompt has begun, before an answer that is held to a grammar
        after `opening`.
        """
        return f"\n{self.end}\n\n"

    def finder(self, *, begun: bool) -> ThoughtFinder:
        """Finds the thought of one answer; `begun`: the prompt ends within it."""
        return TagFinder(self, begun=begun)


class ThoughtFinder(Protocol):
    """Splits a stream of text into a thought and what else there is."""

    @property
    def within(self) -> bool:
        """Whether the thought goes on."""

    def push(self, piece: str) -> tuple[str, str]:
        """(thought, text) that are certain now."""

    def flush(self) -> tuple[str, str]:
        """What is left once no more text comes."""


class Harmony:
    """The messages of gpt-oss, which say in a header what they are: analysis is a thought, a call
    goes on to whoever finds calls, all else is the answer.
    """

    begin = "<|start|>assistant"
    end = "<|end|>"
    shown = HARMONY.markers

    def begun(self, prompt: str) -> bool:
        """Whether a prompt ends where a header begins."""
        return prompt.endswith(self.begin)

    def closing(self, opening: str) -> str:
        """A header for the answer, unless `opening` is one."""
        return "" if opening else "<|channel|>final<|message|>"

    def finder(self, *, begun: bool) -> ThoughtFinder:
        """Tells messages of one answer apart; `begun`: it begins with a header."""
        return ChannelFinder(begun=begun)


_KNOWN = (
    Markers("<think>", "</think>"),
    Markers("[THINK]", "[/THINK]"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),
    Markers("<|channel>thought\n", "<channel|>"),
)


def markers_of(template: ChatTemplate) -> Markers | Harmony | None:
    """How the model behind a template thinks aloud; None when its template knows no thoughts."""
    if all(each in template.source for each in ("<|start|>", "<|channel|>", "<|message|>")):
        return Harmony()
    return next((known for known in _KNOWN if known.end in template.source), None)


_TAIL = 64
"""Tokens of a prompt's end that show whether a thought has begun."""


def begun_by(thoughts: Markers | Harmony | None, shown: Text, prompt: Sequence[int]) -> bool:
    """Whether the ids of a prompt end within a thought; texts of `shown` have the markers."""
    return thoughts is not None and thoughts.begun(shown.decode(prompt[-_TAIL:]))


class TagFinder:
    """Splits a stream of text into a thought, if it begins with one, and what follows; white space
    around the thought is dropped, text that may be the start of a marker held back.
    """

    def __init__(self, markers: Markers, *, begun: bool) -> None:
        """`begun`: the prompt ends within a thought."""
        self._markers = markers
        self._held = ""
        self._state = "thought" if begun else "start"
        self._bare = begun  # nothing but white space so far

    @property
    def within(self) -> bool:
        """Whether the thought goes on."""
        return self._state == "thought"

    def push(self, piece: str) -> tuple[str, str]:
        """(thought, text) that are certain now."""
        self._held += piece
        thought = ""
        begin, end = self._markers.begin, self._markers.end
        if self._state == "start":
            held = self._held.lstrip()
            if held.startswith(begin):
                self._state, self._held, self._bare = "thought", held[len(begin) :], True
            elif not begin.startswith(held):
                self._state = "text"
        if self._state == "thought":
            thought, found, rest = self._held.partition(end)
            if found:
                self._state, self._held, thought = "after", rest, thought.rstrip()
            else:
                certain = len(self._held) - tail(self._held, (end,))
                certain = len(self._held[:certain].rstrip())
                thought, self._held = self._held[:certain], self._held[certain:]
            if self._bare:
                thought = thought.lstrip()
                self._bare = not thought
        if self._state == "after":
            self._held = self._held.lstrip()
            self._state = "text" if self._held else "after"
        if self._state != "text":
            return thought, ""
        text, self._held = self._held, ""
        return thought, text

    def flush(self) -> tuple[str, str]:
        """What is left once no more text comes."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._state == "thought" else ("", held)


_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_HEADS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "to=")


class ChannelFinder:
    """Splits harmony's messages into thought and text; a call comes as text in the form that
    `HARMONY` reads. An answer without headers is text.
    """

    def __init__(self, *, begun: bool) -> None:
        """`begun`: a header comes first, else the text of an answer."""
        self._held = ""
        self._channel = "" if begun else "final"  # "" within a header
        self._call = ""

    @property
    def within(self) -> bool:
        """Whether the thought goes on."""
        return self._channel == "analysis"

    def push(self, piece: str) -> tuple[str, str]:
        """(thought, text) that are certain now."""
        self._held += piece
        thought = text = ""
        while self._held:
            if not self._channel:
                if not self._heading():
                    break
                text += self._call
                continue
            at, end = min(
                ((at, end) for end in _ENDS if (at := self._held.find(end)) >= 0), default=(-1, "")
            )
            certain = at if end else len(self._held) - tail(self._held, _ENDS)
            said, self._held = self._held[:certain], self._held[certain:]
            thought += said if self._channel == "analysis" else ""
            text += said if self._channel != "analysis" else ""
            if not end:
                break
            text += HARMONY.end if self._channel == "call" else ""
            self._held = self._held.removeprefix("" if end == "<|start|>" else end)
            self._channel = ""
        return thought, text

    def flush(self) -> tuple[str, str]:
        """What is left once no more text comes; a header that has not ended is dropped."""
        held, self._held = self._held, ""
        if not self._channel:
            return "", ""
        return (held, "") if self._channel == "analysis" else ("", held)

    def _heading(self) -> bool:
        """Read the header that the held text begins with; whether it is whole."""
        bare = self._held.lstrip()
        if not any(bare.startswith(head) or head.startswith(bare) for head in _HEADS):
            self._channel = "final"
            return True
        header, found, rest = self._held.partition("<|message|>")
        if not found:
            return False
        to = re.search(r"to=functions\.([^\s<]+)", header)
        channel = re.search(r"<\|channel\|>(\w+)", header)
        self._held = rest
        self._channel = "call" if to else channel[1] if channel else "final"
        self._call = f"{HARMONY.begin}{to[1]}<|message|>" if to else ""
        return True
