"""How model families write tool calls, a row each. All of them are read; where an answer has to be
a call, its arguments are held to their schema as JSON, also within tags that have others as a rule.

    Hermes, Qwen, ERNIE, Granite 4   <tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call>
    Qwen3-Coder, Nemotron 3          <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...
    GLM 4.5 to 5                     <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE...
    Seed-OSS                         <seed:tool_call> around Qwen3-Coder's
    MiniMax-M2                       <minimax:tool_call><invoke name="NAME"><parameter name="KEY">
    DeepSeek V3.2, V4                the same with DSML between full-width bars before every name
    DeepSeek V3, V3.1                NAME and {...} between markers of full-width bars
    Kimi K2                          functions.NAME:0 and {...} between markers
    Mistral                          [TOOL_CALLS][{...}], or [TOOL_CALLS]NAME[ARGS]{...}
    gpt-oss                          a message to functions.NAME in the channel commentary
    Cohere, Hunyuan, Granite 3       a list of {...} between markers
    Llama 3 and 4                    {"name": NAME, "parameters": {...}} and nothing else
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
ANY: Json = {"type": "object"}
_DSML = "\uff5cDSML\uff5c"


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
    parts: tuple[tuple[str, Json, str], ...]


Schemas = Mapping[str, Mapping[str, Any]]
"""The schema of every parameter, by the function's name and its own."""


@dataclass(frozen=True)
class Form:
    """One way to write calls. `read` makes calls of what stands between `begin` and `end`, none of
    what is no call; without an `end` a call goes on to the next one or to the end of the answer.
    `wrappers` stand around several calls, `inner` within one; `known` is what a template has that
    writes so, if that is not `begin`. Templates want the arguments of earlier calls as an object,
    or (`arguments_as_text`) as text.
    """

    name: str
    begin: str
    end: str
    read: Callable[[str, Schemas], list[Call]]
    forced: Callable[[Sequence[Json]], Forced]
    wrappers: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    arguments_as_text: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """All that an answer has to show, special tokens or not."""
        return (self.begin, self.end, *self.wrappers, *self.inner)


def schemas_of(tools: Sequence[Json]) -> Schemas:
    """The parameters of tools as a request has them."""
    found = {}
    for tool in tools:
        function = tool["function"]
        parameters = (function.get("parameters") or {}).get("properties")
        found[function["name"]] = parameters if isinstance(parameters, dict) else {}
    return found


def _marker(words: str) -> str:
    """A special token as DeepSeek writes it: full-width bars, and U+2581 for blanks."""
    return "<\uff5c" + words.replace(" ", "\u2581") + "\uff5c>"


def _dump(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _json(text: str) -> Any:
    """The JSON document of a text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _objects(block: str, _: Schemas) -> list[Call]:
    """{"name": NAME, "arguments": {...}} or a list of such, under the names that families use."""
    found = _json(block)
    items = found if isinstance(found, list) else [found]
    calls = []
    for item in items:
        name = item.get("name", item.get("tool_name")) if isinstance(item, dict) else None
        if not isinstance(name, str) or not name:
            return []
        arguments = item.get("arguments", item.get("parameters", {}))
        calls.append(Call(name, _dump(arguments)))
    return calls


def _value(text: str, schema: Any) -> Any:
    """An argument that stands as text between tags: text where its schema says so, else JSON if it
    is such.
    """
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = {kinds} if isinstance(kinds, str) else set(kinds or ())
    if kinds == {"string"}:
        return text
    found = _json(text)
    if found is None and text.strip() != "null":
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)
    return text if isinstance(found, str) else found


def _tagged(name: str, pairs: Sequence[tuple[str, str]], schemas: Schemas) -> Call:
    known = schemas.get(name, {})
    return Call(name, _dump({key: _value(text, known.get(key)) for key, text in pairs}))


_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_INVOKE = re.compile(r'<invoke name="([^"]+)">(.*?)(?:</invoke>|\Z)', re.DOTALL)
_NAMED = re.compile(
    r'<parameter name="([^"]+)"(?: string="(true|false)")?>(.*?)</parameter>', re.DOTALL
)
_ARGUMENT = re.compile(r"<arg_key>\s*(.*?)\s*</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _tags(block: str, schemas: Schemas) -> list[Call]:
    """What families write between `<tool_call>` tags: JSON, functions with parameters, or a name
    with keys and values.
    """
    text = block.strip()
    if text.startswith(("{", "[")):
        return _objects(text, schemas)
    if "<function=" in text:
        return [
            _tagged(name, _PARAMETER.findall(body), schemas)
            for name, body in _FUNCTION.findall(text)
        ]
    name = text.partition("<arg_key>")[0].strip()
    if not re.fullmatch(r"\S+", name) or "<" in name:
        return []
    return [_tagged(name, _ARGUMENT.findall(text), schemas)]


def _invokes(block: str, schemas: Schemas) -> list[Call]:
    """`<invoke name=...>` with parameters by name, each perhaps said to be text or not."""
    text = block.replace(_DSML, "")
    if text.strip().startswith(("{", "[")):
        return _objects(text, schemas)
    calls = []
    for name, body in _INVOKE.findall(text):
        known = dict(schemas.get(name, {}))
        pairs = []
        for key, is_text, value in _NAMED.findall(body):
            if is_text:
                known[key] = {"type": "string" if is_text == "true" else "object"}
            pairs.append((key, value.strip("\n")))
        calls.append(_tagged(name, pairs, {name: known}))
    return calls


_SEPARATOR = _marker("tool sep")


def _deepseek(block: str, _: Schemas) -> list[Call]:
    """Of V3: the kind, the name, arguments in a fence; of V3.1: the name and arguments."""
    head, found, rest = block.partition(_SEPARATOR)
    name = head.strip()
    if name == "function":
        name, rest = rest.split("\n", 1) if "\n" in rest else (rest, "")
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*(?:```)?\s*", rest, re.DOTALL)
    arguments = _json(fenced.group(1) if fenced else rest)
    named = bool(found and name.strip()) and arguments is not None
    return [Call(name.strip(), _dump(arguments))] if named else []


_KIMI = "<|tool_call_argument_begin|>"


def _kimi(block: str, _: Schemas) -> list[Call]:
    """functions.NAME:NUMBER, the marker, arguments."""
    head, rest = block.split(_KIMI, 1) if _KIMI in block else (block, "")
    name = re.fullmatch(r"\s*(?:functions\.)?(\S+?)(?::\d+)?\s*", head)
    arguments = _json(rest)
    return [Call(name[1], _dump(arguments))] if name and arguments is not None else []


def _mistral(block: str, schemas: Schemas) -> list[Call]:
    """A list of JSON, or NAME[ARGS]{...} with an id between them."""
    head, found, rest = block.partition("[ARGS]")
    if not found:
        return _objects(block, schemas)
    name, arguments = head.partition("[CALL_ID]")[0].strip(), _json(rest)
    return [Call(name, _dump(arguments))] if name and arguments is not None else []


def _harmony(block: str, _: Schemas) -> list[Call]:
    """NAME, perhaps the kind of the content, <|message|>, arguments."""
    head, found, rest = block.partition("<|message|>")
    name, arguments = re.match(r"[^\s<]+", head), _json(rest)
    return [Call(name[0], _dump(arguments))] if found and name and arguments is not None else []


_LLAMA = '{"name": "'


def _llama(block: str, schemas: Schemas) -> list[Call]:
    return _objects(_LLAMA + block, schemas)


def _lifted(schema: Json, key: str) -> Json:
    """Definitions of the schema of property `key` moved to the top, where its references look."""
    inner = dict(schema["properties"][key])
    for place in ("$defs", "definitions"):
        if place in inner:
            schema = {**schema, place: inner.pop(place)}
    return {**schema, "properties": {**schema["properties"], key: inner}}


def _as_object(
    opening: str,
    name: str = "name",
    arguments: str = "arguments",
    around: tuple[str, str] = ("", ""),
) -> Callable[[Sequence[Json]], Forced]:
    """{"name": NAME, "arguments": {...}} after `opening`, within `around`."""

    def forced(tools: Sequence[Json]) -> Forced:
        parts = []
        for tool in tools:
            function = tool["function"]
            schema = {
                "type": "object",
                "properties": {
                    name: {"const": function["name"]},
                    arguments: function.get("parameters") or ANY,
                },
                "required": [name, arguments],
                "additionalProperties": False,
            }
            parts.append((around[0], _lifted(schema, arguments), around[1]))
        return Forced(opening, tuple(parts))

    return forced


def _after_name(opening: str, between: str) -> Callable[[Sequence[Json]], Forced]:
    """NAME, `between` and {...} after `opening`."""

    def forced(tools: Sequence[Json]) -> Forced:
        functions = [tool["function"] for tool in tools]
        return Forced(
            opening,
            tuple((f["name"] + between, f.get("parameters") or ANY, "") for f in functions),
        )

    return forced


_CALL = (_marker("tool call begin"), _marker("tool call end"))
_CALLS = (_marker("tool calls begin"), _marker("tool calls end"))
_TO = "<|channel|>commentary to=functions."
_HARMONY = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>")

HERMES = Form("Hermes", "<tool_call>", "</tool_call>", _tags, _as_object("<tool_call>\n"))
GLM = Form(
    "GLM", "<tool_call>", "</tool_call>", _tags, _as_object("<tool_call>"), known=("<arg_key>",)
)
CODER = Form(
    *("Qwen3-Coder", "<tool_call>", "</tool_call>", _tags, _as_object("<tool_call>\n")),
    known=("<tool_call>", "<function="),
)
SEED = Form(
    *("Seed-OSS", "<seed:tool_call>", "</seed:tool_call>", _tags),
    _as_object("<seed:tool_call>\n"),
)
MINIMAX = Form(
    *("MiniMax", "<minimax:tool_call>", "</minimax:tool_call>", _invokes),
    _as_object("<minimax:tool_call>\n"),
)
DSML = Form(
    *("DeepSeek V3.2", f"<{_DSML}function_calls>", f"</{_DSML}function_calls>", _invokes),
    _as_object(f"<{_DSML}function_calls>\n"),
)
DSML_V4 = Form(
    *("DeepSeek V4", f"<{_DSML}tool_calls>", f"</{_DSML}tool_calls>", _invokes),
    _as_object(f"<{_DSML}tool_calls>\n"),
)
DEEPSEEK = Form(
    *("DeepSeek V3", *_CALL, _deepseek),
    _after_name(f"{_CALLS[0]}{_CALL[0]}function{_SEPARATOR}", "\n```json\n"),
    wrappers=_CALLS,
    inner=(_SEPARATOR,),
    arguments_as_text=True,
)
KIMI = Form(
    *("Kimi K2", "<|tool_call_begin|>", "<|tool_call_end|>", _kimi),
    _after_name("<|tool_calls_section_begin|><|tool_call_begin|>functions.", f":0{_KIMI}"),
    wrappers=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    inner=(_KIMI,),
)
MISTRAL = Form(
    *("Mistral", "[TOOL_CALLS]", "", _mistral, _as_object("[TOOL_CALLS]", around=("[", "]"))),
)
MISTRAL_ARGS = Form(
    *("Mistral 3", "[TOOL_CALLS]", "", _mistral, _after_name("[TOOL_CALLS]", "[ARGS]")),
    inner=("[CALL_ID]", "[ARGS]"),
    known=("[TOOL_CALLS]", "[ARGS]"),
)
HARMONY = Form(
    *("harmony", _TO, "<|call|>", _harmony, _after_name(_TO, " <|constrain|>json<|message|>")),
    inner=_HARMONY,
    known=("<|channel|>commentary",),
)
COHERE = Form(
    *("Cohere", "<|START_ACTION|>", "<|END_ACTION|>", _objects),
    _as_object("<|START_ACTION|>", "tool_name", "parameters", ("[", "]")),
)
HUNYUAN = Form(
    *("Hunyuan", "<tool_calls>", "</tool_calls>", _objects),
    _as_object("<tool_calls>", around=("[", "]")),
)
GRANITE = Form(
    *("Granite 3", "<|tool_call|>", "", _objects, _as_object("<|tool_call|>", around=("[", "]"))),
)
LLAMA = Form(
    *("Llama 3", _LLAMA, "", _llama, _as_object("", arguments="parameters")),
    wrappers=("<|python_tag|>",),
    known=('"parameters": {"a": "b"}',),  # as the template writes the call that it is asked for
)

FORMS = (
    *(
        HARMONY,
        DSML,
        DSML_V4,
        DEEPSEEK,
        KIMI,
        MISTRAL_ARGS,
        MISTRAL,
        MINIMAX,
        SEED,
        COHERE,
        GRANITE,
    ),
    *(GLM, CODER, HERMES, HUNYUAN, LLAMA),
)
"""Every form; of two that a template may mean the first is taken."""
