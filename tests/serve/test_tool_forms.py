"""Tool calls as model families write them."""

from __future__ import annotations

import json

import pytest

from hmc.errors import UsageError
from hmc.runtime.tokens.chat import ChatTemplate
from hmc.serve.tools import Call, CallFinder, DeepSeek, Form, Hermes, form_of

BAR, BLANK = "\uff5c", "\u2581"
V3 = (
    f"<{BAR}tool calls begin{BAR}><{BAR}tool call begin{BAR}>function<{BAR}tool sep{BAR}>ark\n"
    f'```json\n{{"cubits": 300}}\n```<{BAR}tool call end{BAR}>\n'
    f"<{BAR}tool call begin{BAR}>function<{BAR}tool sep{BAR}>dove\n"
    f"```json\n{{}}\n```<{BAR}tool call end{BAR}>"
    f"<{BAR}tool calls end{BAR}>"
)
V31 = (
    f"<{BAR}tool calls begin{BAR}><{BAR}tool call begin{BAR}>ark<{BAR}tool sep{BAR}>"
    f'{{"cubits": 300}}<{BAR}tool call end{BAR}><{BAR}tool call begin{BAR}>dove<{BAR}tool sep{BAR}>'
    f"{{}}<{BAR}tool call end{BAR}><{BAR}tool calls end{BAR}>"
)
HERMES = (
    '<tool_call>\n{"name": "ark", "arguments": {"cubits": 300}}\n</tool_call>\n'
    '<tool_call>\n{"name": "dove", "arguments": {}}\n</tool_call>'
)


def _marked(text: str) -> str:
    for words in ("tool calls begin", "tool calls end", "tool call begin", "tool call end"):
        text = text.replace(words, words.replace(" ", BLANK))
    return text.replace("tool sep", f"tool{BLANK}sep")


@pytest.mark.parametrize(
    ("form", "block"), [(Hermes, HERMES), (DeepSeek, _marked(V3)), (DeepSeek, _marked(V31))]
)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_found_however_the_text_is_cut(form: Form, block: str, size: int) -> None:
    finder = CallFinder(form)
    text, calls = "", []
    whole = f"So < be it. {block}"
    for at in range(0, len(whole), size):
        piece, found = finder.push(whole[at : at + size])
        text, calls = text + piece, calls + found
    piece, found = finder.flush()
    assert (text + piece).strip() == "So < be it."
    assert calls + found == [Call("ark", '{"cubits": 300}'), Call("dove", "{}")]


def test_what_is_no_call_stays_text() -> None:
    finder = CallFinder(Hermes)
    given = 'a <tool_call>{"nam": 1}</tool_call> b <tool_call>[1, 2]</tool_call> <tool'
    text, calls = finder.push(given)
    rest, last = finder.flush()
    assert text + rest == given and not calls + last


def test_a_call_without_its_end_counts_if_it_is_whole() -> None:
    for block, calls in (('{"name": "ark"}', [Call("ark", "{}")]), ('{"name": "ar', [])):
        finder = CallFinder(Hermes, "<tool_call>\n")
        finder.push(block)
        text, found = finder.flush()
        assert found == calls and bool(text) == (not calls)


@pytest.mark.parametrize("form", [Hermes, DeepSeek])
def test_what_is_forced_is_what_is_parsed(form: Form) -> None:
    schema = {"type": "object", "properties": {}}
    forced = form.forced([{"function": {"name": "ark", "parameters": schema}}])
    ((before, _, after),) = forced.parts
    value = {"name": "ark", "arguments": {}} if form is Hermes else {}
    finder = CallFinder(form, forced.opening)
    text, calls = finder.push(before + json.dumps(value) + after)
    rest, last = finder.flush()
    assert (text + rest, calls + last) == ("", [Call("ark", "{}")])


def test_a_template_tells_its_form() -> None:
    def template(source: str) -> ChatTemplate:
        return ChatTemplate(source, {}, "here")

    with pytest.raises(UsageError, match="does not know tools"):
        form_of(template("{{ messages[0].content }}"))
    with pytest.raises(UsageError, match="a form hmc does not know"):
        form_of(template("{{ tools }}"))
    assert form_of(template("{{ tools }} write <tool_call>")) is Hermes
    source = "{{ tools }}{% for m in messages %}{% for c in m.tool_calls %}" + _marked(
        f"{{{{ '<{BAR}tool call begin{BAR}>' + c.function.arguments }}}}"
    )
    assert form_of(template(source + "{% endfor %}{% endfor %}")) is DeepSeek
