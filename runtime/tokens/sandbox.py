"""Where chat templates run: jinja2's immutable sandbox with the names that transformers gives them
(raise_exception, strftime_now, tojson, loop controls, generation blocks), and what one of their
errors says.
"""

from __future__ import annotations

import json
from datetime import datetime
from types import TracebackType
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class Refusal(jinja2.TemplateError):
    """A template's own words, by raise_exception."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an answer for training; here: its body, with
    the scope of its own that it has there.
    """

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a name in a template may be "self"
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


def environment(mark: str = "") -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """`mark` is a character that stays as it is where JSON is written in ASCII."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Plain JSON: jinja2's own filter escapes HTML."""
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        return text.replace(json.dumps(mark)[1:-1], mark) if ensure_ascii and mark else text

    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    made.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    made.globals["namespace"] = _Namespace
    return made


def described(error: BaseException) -> str:
    """What went wrong in a template, and at which line of it."""
    line = getattr(error, "lineno", None) or _line(error.__traceback__)
    place = f" (line {line} of the template)" if line else ""
    if isinstance(error, Refusal):
        return f"the chat template refuses these messages: {error}{place}"
    words = "it goes too deep"
    if not isinstance(error, RecursionError):
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return f"the chat template fails on these messages: {words}{place}"


def _line(trace: TracebackType | None) -> int | None:
    """The innermost line of the template in a traceback, which jinja2 has translated."""
    line = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _raise(message: object) -> None:
    raise Refusal(str(message))


def _check(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r} in a sandbox")
