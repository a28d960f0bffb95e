"""Tool calls in the model's own form: which form its chat template writes (`forms.py` has them),
and finding calls in an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hmc.errors import UsageError
from hmc.runtime.tokens.chat import ChatTemplate
from hmc.serve.forms import ANY, FORMS, Call, Form, schemas_of

__all__ = ["Call", "CallFinder", "Form", "form_of", "tail"]


def form_of(template: ChatTemplate) -> Form:
    """How this template writes calls, found by letting it write one; where it refuses to, by what
    stands in it.

    Raises `UsageError` for a template that does not know tools, or writes them in a way that is
    not known here.
    """
    name = "probe_of_tools"
    parameters = {**ANY, "properties": {}, "required": []}
    function = {"name": name, "description": "", "parameters": parameters}
    tool = {"type": "function", "function": function}
    question = {"role": "user", "content": "?"}
    if name not in (offered := template.render([question], tools=[tool])):
        raise UsageError("this model's chat template does not know tools")
    text = offered + (_written(template, question, tool, name) or template.literals)
    for form in FORMS:
        if all(each in text for each in form.known or (form.begin,)):
            return form
    raise UsageError("this model's chat template writes tool calls in a form hmc does not know")


def _written(
    template: ChatTemplate, question: dict[str, Any], tool: dict[str, Any], name: str
) -> str:
    """A call as the template writes it; "" where it writes none."""
    for arguments in ({"a": "b"}, '{"a": "b"}'):  # a template may want them as text
        call = {"id": "call00001", "type": "function"}
        called = {**call, "function": {"name": name, "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [called]}
        try:
            return template.render([question, answer], tools=[tool])
        except UsageError:
            continue
    return ""


class CallFinder:
    """Splits a stream of text into plain text and calls; text that may be the start of a marker is
    held back, and a block that is no call is given out as it is.
    """

    def __init__(self, form: Form, opening: str = "", tools: Sequence[dict[str, Any]] = ()) -> None:
        """`opening` is what stands before the text already; `tools` say which arguments are
        text.
        """
        self._form, self._held = form, opening
        self._schemas = schemas_of(tools)

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Plain text that is certain, and calls that are complete."""
        self._held += piece
        text, calls = "", list[Call]()
        while True:
            start = self._held.find(self._form.begin)
            certain = start
            if start < 0:
                certain = len(self._held) - tail(
                    self._held, (self._form.begin, *self._form.wrappers)
                )
            text += self._bare(self._held[:certain])
            self._held = self._held[certain:]
            if start < 0 or (stop := self._stop()) < 0:
                return text, calls
            block, self._held = self._held[:stop], self._held[stop:]
            found = self._read(block)
            text += "" if found else block
            calls += found

    def flush(self) -> tuple[str, list[Call]]:
        """What is left once no more text comes; a call whose end marker is missing counts."""
        held, self._held = self._held, ""
        if held.startswith(self._form.begin) and (calls := self._read(held)):
            return "", calls
        return self._bare(held), []

    def _stop(self) -> int:
        """Where the call that the held text begins with ends; -1 when it has not ended yet."""
        begin, end = self._form.begin, self._form.end
        if not end:
            return self._held.find(begin, len(begin))
        place = self._held.find(end, len(begin))
        return place + len(end) if place >= 0 else -1

    def _read(self, block: str) -> list[Call]:
        inner = block.removeprefix(self._form.begin)
        inner = inner.removesuffix(self._form.end) if self._form.end else inner
        return self._form.read(inner, self._schemas)

    def _bare(self, text: str) -> str:
        for wrapper in self._form.wrappers:
            text = text.replace(wrapper, "")
        return text


def tail(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `markers`."""
    longest = max(len(marker) for marker in markers)
    for length in range(min(len(text), longest), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
