"""A checkpoint's chat template: messages in, prompt text out; hides where it is rendered.

Templates come with a checkpoint and are not trusted: jinja2's immutable sandbox (`sandbox.py`) runs
them in a process of its own (`rendering.py`).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes

from hmc.errors import TokenizerError, UsageError
from hmc.runtime.tokens.rendering import Ask, Renderers
from hmc.runtime.tokens.sandbox import environment

_RENDERERS = Renderers()
_OURS = ("messages", "tools", "add_generation_prompt")


class ChatTemplate:
    """One template with the special tokens it may print; `source` is its text, `literals` what of
    it can come out as it is.
    """

    def __init__(self, source: str, tokens: dict[str, str], origin: str) -> None:
        """Raises `TokenizerError` naming `origin` when the template does not parse."""
        self.source = source
        self.tokens = tokens
        try:
            parsed = environment().parse(source)
            texts = [each.data for each in parsed.find_all(jinja2.nodes.TemplateData)]
            texts += [str(each.value) for each in parsed.find_all(jinja2.nodes.Const)]
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            line = getattr(error, "lineno", None)
            place = f"{origin}, line {line}" if line else origin
            raise TokenizerError(f"{place}: the chat template is broken: {error}") from error
        self.literals = "\0".join(texts)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        mark: str = "",
    ) -> str:
        """The prompt text of `messages` ({"role": ..., "content": ...} each), ready for an answer.

        With `continue_final_message` it ends where the last message's content does, for the model
        to go on with it. `variables` are what this template knows besides. `mark`, a character in
        the texts, comes through as it is.

        Raises `UsageError` with the template's own words, or what went wrong, and its line, when it
        does not take the messages, and when that takes too much time or memory.
        """
        given, end = list(messages), ""
        if continue_final_message:
            content = given[-1].get("content") if given else None
            if not isinstance(content, str):
                raise UsageError("continue_final_message: the last message has no text to go on")
            end = uuid.uuid4().hex  # no content holds it
            given[-1] = {**given[-1], "content": content + end}
        if wrong := next((name for name in _OURS if name in (variables or {})), ""):
            raise UsageError(f"{wrong} is no variable of chat templates")
        names = {
            "documents": None,  # as transformers has it
            **(variables or {}),
            **self.tokens,
            "messages": given,
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        text = _RENDERERS.render(Ask(self.source, names, mark))
        if end not in text:
            raise UsageError("the chat template does not show the content of the last message")
        return text[: text.rindex(end)] if end else text
