"""Tool calls as model families write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chats import byte_level

from hmc.errors import UsageError
from hmc.runtime.tokens.chat import ChatTemplate
from hmc.runtime.tokens.files import TokenizerFiles
from hmc.serve import forms
from hmc.serve.grammar import Grammars
from hmc.serve.tools import Call, CallFinder, Form, form_of
from hmc.serve.vocabulary import Vocabulary

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


V32 = (
    '<DSMLfunction_calls>\n<DSMLinvoke name="ark">\n'
    '<DSMLparameter name="cubits" string="false">300</DSMLparameter>\n</DSMLinvoke>\n'
    '<DSMLinvoke name="dove">\n</DSMLinvoke>\n</DSMLfunction_calls>'
).replace("DSML", f"{BAR}DSML{BAR}")
CODER_CALLS = (
    "<tool_call>\n<function=ark>\n<parameter=cubits>\n300\n</parameter>\n</function>\n</tool_call>"
    "\n<tool_call>\n<function=dove>\n</function>\n</tool_call>"
)
GLM_CALLS = (
    "<tool_call>ark\n<arg_key>cubits</arg_key>\n<arg_value>300</arg_value>\n</tool_call>"
    "<tool_call>dove</tool_call>"
)
MINIMAX_CALLS = (
    '<minimax:tool_call>\n<invoke name="ark">\n<parameter name="cubits">300</parameter>\n</invoke>'
    '\n<invoke name="dove">\n</invoke>\n</minimax:tool_call>'
)
KIMI_CALLS = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.ark:0<|tool_call_argument_begin|>"
    '{"cubits": 300}<|tool_call_end|><|tool_call_begin|>functions.dove:1'
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
)
LISTED = '[{"name": "ark", "arguments": {"cubits": 300}}, {"name": "dove", "arguments": {}}]'
PARAMETERS = LISTED.replace("arguments", "parameters")
BLOCKS = [
    (forms.HERMES, HERMES),
    (forms.CODER, CODER_CALLS),
    (forms.GLM, GLM_CALLS),
    (forms.SEED, CODER_CALLS.replace("tool_call>", "seed:tool_call>")),
    (forms.MINIMAX, MINIMAX_CALLS),
    (forms.DSML, V32),
    (forms.DSML_V4, V32.replace("function_calls", "tool_calls")),
    (forms.DEEPSEEK, _marked(V3)),
    (forms.DEEPSEEK, _marked(V31)),
    (forms.KIMI, KIMI_CALLS),
    (forms.MISTRAL, f"[TOOL_CALLS]{LISTED}"),
    (forms.MISTRAL_ARGS, '[TOOL_CALLS]ark[CALL_ID]1[ARGS]{"cubits": 300}[TOOL_CALLS]dove[ARGS]{}'),
    (
        forms.HARMONY,
        '<|channel|>commentary to=functions.ark <|constrain|>json<|message|>{"cubits": 300}'
        "<|call|><|channel|>commentary to=functions.dove<|message|>{}<|call|>",
    ),
    (forms.COHERE, f"<|START_ACTION|>{PARAMETERS.replace('name', 'tool_name')}<|END_ACTION|>"),
    (forms.HUNYUAN, f"<tool_calls>{LISTED}</tool_calls>"),
    (forms.GRANITE, f"<|tool_call|>{LISTED}"),
]
TOOLS = [
    {"function": {"name": "ark", "parameters": {"properties": {"cubits": {"type": "integer"}}}}},
    {"function": {"name": "dove"}},
]


@pytest.mark.parametrize(("form", "block"), BLOCKS, ids=[form.name for form, _ in BLOCKS])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_found_however_the_text_is_cut(form: Form, block: str, size: int) -> None:
    finder = CallFinder(form, "", TOOLS)
    text, calls = "", []
    whole = f"So < be it. {block}"
    for at in range(0, len(whole), size):
        piece, found = finder.push(whole[at : at + size])
        text, calls = text + piece, calls + found
    piece, found = finder.flush()
    assert (text + piece).strip() == "So < be it."
    assert calls + found == [Call("ark", '{"cubits": 300}'), Call("dove", "{}")]


def test_a_bare_object_is_a_call_of_llamas() -> None:
    finder = CallFinder(forms.LLAMA)
    text, calls = finder.push('<|python_tag|>{"name": "ark", "parameters": {"cubits": 300}}')
    rest, last = finder.flush()
    assert (text + rest, calls + last) == ("", [Call("ark", '{"cubits": 300}')])


def test_arguments_between_tags_are_of_the_kind_that_their_schema_says() -> None:
    kinds: dict[str, Any] = {
        "text": {"type": "string"},
        "number": {"type": ["number", "null"]},
        "list": {"type": "array"},
        "yes": {"type": "boolean"},
    }
    tools = [{"function": {"name": "f", "parameters": {"properties": kinds}}}]
    values = {"text": "12", "number": "1.5", "list": '["a"]', "yes": "True", "other": "a\n b"}
    tags = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    _, (call,) = CallFinder(forms.CODER, "", tools).push(
        f"<tool_call><function=f>{tags}</function></tool_call>"
    )
    expected = {"text": "12", "number": 1.5, "list": ["a"], "yes": True, "other": "a\n b"}
    assert json.loads(call.arguments) == expected


def test_what_is_no_call_stays_text() -> None:
    finder = CallFinder(forms.HERMES)
    given = 'a <tool_call>{"nam": 1}</tool_call> b <tool_call>[1, 2]</tool_call> <tool'
    text, calls = finder.push(given)
    rest, last = finder.flush()
    assert text + rest == given and not calls + last


def test_a_call_without_its_end_counts_if_it_is_whole() -> None:
    for block, calls in (('{"name": "ark"}', [Call("ark", "{}")]), ('{"name": "ar', [])):
        finder = CallFinder(forms.HERMES, "<tool_call>\n")
        finder.push(block)
        text, found = finder.flush()
        assert found == calls and bool(text) == (not calls)


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.name)
def test_what_is_forced_is_what_is_read(form: Form) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {}}}
    tools = [{"function": {"name": "ark", "parameters": schema}}]
    forced = form.forced(tools)
    ((before, held, after),) = forced.parts
    assert "a" in held["$defs"]
    value: dict[str, Any] = {"a": 1}
    for name, called in (
        ("name", "arguments"),
        ("name", "parameters"),
        ("tool_name", "parameters"),
    ):
        if {name, called} <= set(held["properties"]):
            assert held["properties"][name] == {"const": "ark"}
            value = {name: "ark", called: {"a": 1}}
    finder = CallFinder(form, forced.opening, tools)
    text, calls = finder.push(before + json.dumps(value) + after)
    rest, last = finder.flush()
    assert (text + rest, calls + last) == ("", [Call("ark", '{"a": 1}')])


WRITING = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}"


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.name)
def test_a_template_tells_its_form(form: Form) -> None:
    written = "".join(form.known or (form.begin,))
    source = f"{{{{ tools }}}}{WRITING}{{{{ {json.dumps(written, ensure_ascii=False)} }}}}"
    assert form_of(_template(source + "{% endfor %}{% endfor %}")) is form
    refusing = f"{WRITING}{{{{ raise_exception({json.dumps(written, ensure_ascii=False)}) }}}}"
    source = "{{ tools }}" + refusing + "{% endfor %}{% endfor %}"
    assert form_of(_template(source)) is form


def test_a_template_that_knows_no_tools_or_no_known_form() -> None:
    with pytest.raises(UsageError, match="does not know tools"):
        form_of(_template("{{ messages[0].content }}"))
    with pytest.raises(UsageError, match="a form hmc does not know"):
        form_of(_template("{{ tools }}"))
    text_alone = "{{ tools }}{% for m in messages[1:] %}{{ '<tool_call>' + m.tool_calls[0].function"
    assert form_of(_template(text_alone + ".arguments }}{% endfor %}")) is forms.HERMES


def _template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, "here")


def test_a_forced_call_is_held_to_its_special_tokens(tmp_path: Path) -> None:
    """Which a model writes as one token each, and not as letters."""
    tokenizer = byte_level(list(forms.HARMONY.inner), [])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    files = TokenizerFiles.read(tmp_path)
    assert files is not None
    end = tokenizer.token_to_id("<|return|>")
    size = tokenizer.get_vocab_size()
    grammars = Grammars(Vocabulary(files), size, [end])
    tools = [{"function": {"name": name, "parameters": {"type": "object"}}} for name in "ab"]
    mask = grammars.mask(grammars.either(forms.HARMONY.forced(tools).parts))
    said = tokenizer.encode("b <|constrain|>json<|message|>{}").ids
    for place, token in enumerate(said):
        allowed = mask(said[:place])
        assert allowed[token], tokenizer.id_to_token(token)
    ends = mask(said)
    assert ends[end] and not ends[said[0]]
