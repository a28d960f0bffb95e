"""The part of an answer that a model thinks aloud, set apart by the model's own markers."""

from __future__ import annotations

from dataclasses import dataclass

from hmc.runtime.tokens.chat import ChatTemplate
from hmc.serve.tools import tail


@dataclass(frozen=True)
class Markers:
    """What stands around a thought."""

    begin: str
    end: str

    def begun(self, prompt: str) -> bool:
        """Whether a prompt ends where a thought begins."""
        return prompt.rstrip().endswith(self.begin)


_KNOWN = (
    Markers("<think>", "</think>"),
    Markers("[THINK]", "[/THINK]"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),
)


def markers_of(template: ChatTemplate) -> Markers | None:
    """How the model behind a template thinks aloud; None when its template knows no thoughts."""
    return next((known for known in _KNOWN if known.end in template.source), None)


class ThoughtFinder:
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
