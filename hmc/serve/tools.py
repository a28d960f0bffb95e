"""Tool calls in the model's own form: offering tools through its chat template, holding an answer
to a call, and finding calls in an answer; hides how model families write them.

    Hermes, Qwen   <tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call>
    DeepSeek V3    <|tool calls begin|><|tool call begin|>function<|tool sep|>NAME\\n```json\\n{...}
                   \\n```<|tool call end|>...<|tool calls end|>      (with full-width bars)
    DeepSeek V3.1  the same with NAME<|tool sep|>{...}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hmc.errors import UsageError
from hmc.runtime.tokens.chat import ChatTemplate

_ANY = {"type": "object"}


@dataclass(frozen=True)
class Call:
    """A tool call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Forced:
    """An answer that has to be a call: `opening` is put before it, the rest follows one of `parts`
    (literal text, schema, literal text).
    """

    opening: str
    parts: tuple[tuple[str, dict[str, Any], str], ...]


class Hermes:
    """The form of Hermes and Qwen."""

    begin, end = "<tool_call>", "</tool_call>"
    wrappers: tuple[str, ...] = ()
    arguments_as_text = False  # how its templates want the arguments of earlier calls

    @staticmethod
    def parse(block: str) -> Call | None:
        """The call between begin and end; None when it is none."""
        try:
            found = json.loads(block)
        except ValueError:
            return None
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        return Call(found["name"], _dump(found.get("arguments", found.get("parameters", {}))))

    @staticmethod
    def forced(tools: Sequence[dict[str, Any]]) -> Forced:
        """How an answer that calls one of `tools` is written."""
        parts = []
        for tool in tools:
            function = tool["function"]
            schema = {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": function.get("parameters") or _ANY,
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            parts.append(("", _lifted(schema, "arguments"), ""))
        return Forced("<tool_call>\n", tuple(parts))


def _marker(words: str) -> str:
    """A special token as DeepSeek writes it: full-width bars, and U+2581 for blanks."""
    return "<\uff5c" + words.replace(" ", "\u2581") + "\uff5c>"


class DeepSeek:
    """The form of DeepSeek V3; reads that of V3.1 too."""

    begin, end = _marker("tool call begin"), _marker("tool call end")
    wrappers = (_marker("tool calls begin"), _marker("tool calls end"))
    separator = _marker("tool sep")
    arguments_as_text = True

    @classmethod
    def parse(cls, block: str) -> Call | None:
        """The call between begin and end; None when it is none."""
        head, found, rest = block.partition(cls.separator)
        if not found:
            return None
        name = head.strip()
        if name == "function":
            name, _, rest = rest.partition("\n")
        fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*(?:```)?\s*", rest, re.DOTALL)
        try:
            arguments = json.loads(fenced.group(1) if fenced else rest)
        except ValueError:
            return None
        return Call(name.strip(), _dump(arguments)) if name.strip() else None

    @classmethod
    def forced(cls, tools: Sequence[dict[str, Any]]) -> Forced:
        """How an answer that calls one of `tools` is written."""
        opening = f"{cls.wrappers[0]}{cls.begin}function{cls.separator}"
        parts = tuple(
            (f"{t['function']['name']}\n```json\n", t["function"].get("parameters") or _ANY, "")
            for t in tools
        )
        return Forced(opening, parts)


Form = type[Hermes] | type[DeepSeek]


def form_of(template: ChatTemplate) -> Form:
    """How this template writes calls, found by letting it write one.

    Raises `UsageError` for a template that does not know tools, or writes them in a way that is
    not known here.
    """
    name = "probe_of_tools"
    tool = {"type": "function", "function": {"name": name, "description": "", "parameters": _ANY}}
    question = {"role": "user", "content": "?"}
    offered = template.render([question], tools=[tool])
    if name not in offered:
        raise UsageError("this model's chat template does not know tools")
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": {}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        text = offered + template.render([question, answer], tools=[tool])
    except UsageError:  # a template may want the arguments as text
        call["function"] = {"name": name, "arguments": "{}"}
        text = offered + template.render([question, answer], tools=[tool])
    for form in (DeepSeek, Hermes):
        if form.begin in text:
            return form
    raise UsageError("this model's chat template writes tool calls in a form hmc does not know")


class CallFinder:
    """Splits a stream of text into plain text and calls; text that may be the start of a marker is
    held back, and a block that is no call is given out as it is.
    """

    def __init__(self, form: Form, opening: str = "") -> None:
        """`opening` is what stands before the text already."""
        self._form, self._held = form, opening

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Plain text that is certain, and calls that are complete."""
        self._held += piece
        begin, end = self._form.begin, self._form.end
        text, calls = "", list[Call]()
        while True:
            start = self._held.find(begin)
            stop = self._held.find(end, start) if start >= 0 else -1
            certain = start
            if start < 0:
                certain = len(self._held) - tail(self._held, (begin, *self._form.wrappers))
            text += self._bare(self._held[:certain])
            self._held = self._held[certain:]
            if stop < 0:
                return text, calls
            block, _, self._held = self._held.partition(end)
            call = self._form.parse(block[len(begin) :])
            if call is None:
                text += block + end
            else:
                calls.append(call)

    def flush(self) -> tuple[str, list[Call]]:
        """What is left once no more text comes; a call whose end marker is missing counts."""
        held, self._held = self._held, ""
        if held.startswith(self._form.begin):
            call = self._form.parse(held[len(self._form.begin) :])
            if call is not None:
                return "", [call]
        return self._bare(held), []

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


def _lifted(schema: dict[str, Any], key: str) -> dict[str, Any]:
    """Definitions of the schema of property `key` moved to the top, where its references look."""
    inner = dict(schema["properties"][key])
    for place in ("$defs", "definitions"):
        if place in inner:
            schema = {**schema, place: inner.pop(place)}
    return {**schema, "properties": {**schema["properties"], key: inner}}


def _dump(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
