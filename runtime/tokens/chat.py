"""A checkpoint's chat template: messages in, prompt text out; hides the sandbox it runs in.

Templates come with a checkpoint and are not trusted: jinja2's immutable sandbox runs them. The
names they may use (raise_exception, strftime_now, tojson, loop controls, generation blocks) are
those that transformers gives them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from hmc.errors import TokenizerError, UsageError


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an answer for training; here: its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template with the special tokens it may print; `source` is its text."""

    def __init__(self, source: str, tokens: dict[str, str], origin: str) -> None:
        """Raises `TokenizerError` naming `origin` when the template does not parse."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{origin}: the chat template is broken: {error}") from error
        self._tokens = tokens

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of `messages` ({"role": ..., "content": ...} each), ready for an answer.

        With `continue_final_message` it ends where the last message's content does, for the model
        to go on with it. `variables` are what this template knows besides.

        Raises `UsageError` with the template's own words when it refuses the messages.
        """
        given, mark = list(messages), ""
        if continue_final_message:
            mark = uuid.uuid4().hex  # no content holds it
            given[-1] = {**given[-1], "content": given[-1]["content"] + mark}
        names = {
            **(variables or {}),
            **self._tokens,
            "messages": given,
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            text = self._template.render(names)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error
        if mark not in text:
            raise UsageError("the chat template does not show the content of the last message")
        return text[: text.rindex(mark)] if mark else text


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
