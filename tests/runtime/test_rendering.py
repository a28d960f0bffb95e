"""Whatever a chat template or its data do: one line that says what and where, in bounded time and
memory, while other threads go on.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest

from hmc.errors import TokenizerError, UsageError
from hmc.runtime.tokens.chat import ChatTemplate
from hmc.runtime.tokens.rendering import Ask, Renderers

USER = {"role": "user", "content": "hi"}
MANY = "messages | length"  # nothing of it can be computed before it runs


@pytest.fixture(scope="module")
def renderers() -> Renderers:
    return Renderers()


def _refused(source: str, *messages: Any, **variables: Any) -> str:
    with pytest.raises(UsageError) as found:
        ChatTemplate(source, {}, "here").render(messages or [USER], variables=variables)
    return str(found.value)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        (f"1 / (1 - {MANY})", "ZeroDivisionError: division by zero"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("messages[0].content + 1", "TypeError: can only concatenate str"),
        ("messages[7].content", "UndefinedError: list object has no element 7"),
        ("nobody.content", "UndefinedError: 'nobody' is undefined"),
        ("range(10 ** 9)", "OverflowError: Range too big"),
        ("10.0 ** 309", "OverflowError: "),
        ("'%d' % 'a'", "TypeError"),
        ("messages | nothing", "TemplateRuntimeError: No filter named 'nothing'"),
        ("messages[0].content.index('x')", "ValueError: substring not found"),
        ("strftime_now(3)", "TypeError"),
        ("''.__class__.__mro__", "SecurityError"),
        ("namespace(_x=1)", "SecurityError"),
        ("messages.append(1)", "SecurityError"),
        ("'\\ud800'.encode('utf-8')", "UnicodeEncodeError"),
    ],
)
def test_every_error_names_its_line(expression: str, said: str) -> None:
    found = _refused("{% if true %}\n\n{{ " + expression + " }}{% endif %}")
    assert said in found and found.endswith("(line 3 of the template)")
    assert found.startswith("the chat template fails on these messages: ")
    assert "\n" not in found


def test_a_refusal_is_in_the_templates_own_words() -> None:
    found = _refused("\n{{ raise_exception('no, ' + messages[0].role) }}")
    assert found == ("the chat template refuses these messages: no, user (line 2 of the template)")
    assert "deep" in _refused("{% macro a(x) %}{{ a(x) }}{% endmacro %}{{ a(1) }}")
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    assert "plain data" in _refused("{{ deep }}", deep=nested)
    assert "plain data" in _refused("{{ call }}", call=lambda: 1)
    while nested:  # a list that deep cannot be taken apart at once
        nested = nested[0]


@pytest.mark.parametrize("source", ["\n{% if %}", "{{ " + "(" * 3000 + " }}", "{% endfor %}"])
def test_a_broken_template_is_refused_when_it_is_opened(source: str) -> None:
    with pytest.raises(TokenizerError, match=r"here.*the chat template is broken"):
        ChatTemplate(source, {}, "here")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        f"{{{{ 10 ** (10 ** 8 * {MANY}) }}}}",
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(200) %}"
        "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    ],
    ids=["loops", "power", "comparison"],
)
def test_an_endless_template_ends_and_others_go_on(renderers: Renderers, source: str) -> None:
    beats, ended = 0, threading.Event()

    def beat() -> None:
        nonlocal beats
        while not ended.wait(0.01):
            beats += 1

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageError, match=r"takes more than 0\.2 s"):
            renderers.render(Ask(source, {"messages": [USER]}, ""), 0.2)
    finally:
        ended.set()
        thread.join()
    assert beats > 1
    assert renderers.render(Ask("{{ a }}", {"a": "goes on"}, "")) == "goes on"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 11 }}",
        f"{{{{ 'a' * (10 ** 11 * {MANY}) }}}}",
        "{{ '%*d' % (10 ** 9 * 2, 1) }}",
        "{{ messages[0].content.ljust(10 ** 9 * 2) }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ messages[0].content * 10 ** 8 }}",
    ],
)
def test_a_template_that_explodes_is_refused(renderers: Renderers, source: str) -> None:
    with pytest.raises(UsageError, match=r"takes more than 1024 MiB|writes more than \d+ char"):
        renderers.render(Ask(source, {"messages": [USER]}, ""))
    assert renderers.render(Ask("{{ a }}", {"a": "goes on"}, "")) == "goes on"


def test_many_threads_at_once(renderers: Renderers) -> None:
    found: dict[int, str] = {}

    def one(number: int) -> None:
        found[number] = renderers.render(Ask("{{ n * 2 }}", {"n": number}, ""))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number * 2) for number in range(12)}


def test_a_process_that_is_gone_is_replaced(renderers: Renderers) -> None:
    renderers.render(Ask("a", {}, ""))
    for child in renderers._free:
        child.kill()
    assert renderers.render(Ask("a", {}, "")) == "a"


def test_an_answer_is_gone_on_with() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}", {}, "here")
    said = {"role": "assistant", "content": "He "}
    assert template.render([USER, said], continue_final_message=True) == "[hi][He "
    for messages in ([], [{"role": "assistant"}], [{"role": "assistant", "content": ["a"]}]):
        with pytest.raises(UsageError, match="no text to go on"):
            template.render(messages, continue_final_message=True)
