"""The built-in page: what its text must not hold, and, where there is a Chromium, what it does
against a live server.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import browser as chromium
import httpx
import pytest
from page_person import Person, needs_browser

from hmc.plan import Plan
from hmc.serve import page
from hmc.serve.models import Model, Models
from hmc.serve.service import Settings

FOLDER = Path(page.__file__).parent
SCRIPTS = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.js"))}
HTML = (FOLDER / "index.html").read_text()


def test_the_page_needs_nothing_from_elsewhere(live: Any) -> None:
    reply = httpx.get(f"{live.url}/")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    assert re.findall(r"""(?:src|href)=["']?([^"'\s>]*)""", reply.text) == ["data:,"]
    policy = dict(
        rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", reply.text, re.S)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"


def test_no_text_is_read_as_html_or_as_a_script() -> None:
    for name, text in SCRIPTS.items():
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment"
            r"|DOMParser|srcdoc|\beval\b|\bFunction\(|setTimeout\(\s*[\"'`]|setAttribute\(\s*[\"']on",
            text,
        )
        assert not found, name
        assert "</script" not in text and "style:" not in text, name
    assert not re.findall(r"\son\w+=|\sstyle=|javascript:", HTML)


def test_the_scripts_share_one_scope_and_know_the_page() -> None:
    assert {f"{name}.js" for name in page._SCRIPTS} == set(SCRIPTS)
    named = Counter(
        name
        for text in SCRIPTS.values()
        for name in re.findall(r"^(?:async )?(?:function\*? |const |let )(\w+|\$)", text, re.M)
    )
    assert [name for name, times in named.items() if times > 1] == []
    ids = re.findall(r'\bid="([\w-]+)"', HTML)
    assert len(ids) == len(set(ids))
    used = {name for text in SCRIPTS.values() for name in re.findall(r'\$\("([\w-]+)"\)', text)}
    assert used <= set(ids)


@needs_browser
def test_the_page_chats_and_shows_the_plan(browser: chromium.Browser, live: Any) -> None:
    page = browser.open(f"{live.url}/?ask=Who+is+he&temperature=0")
    page.wait_for("document.querySelector('.turn.assistant .note')?.textContent.includes('tok/s')")
    shown = page.run("document.body.innerText")
    assert "Who is he" in shown and "DeepseekV3ForCausalLM" in shown and "host: 96 experts" in shown
    assert re.search(r"context: \d+ of 1,024 tokens", shown) and "blocks in use" in shown
    rects = page.run("document.querySelectorAll('#map rect').length")
    assert rects == len(live.service.plan.placement)
    assert page.run("document.querySelector('.error')") is None and page.faults == []
    page.call("Page.close")


@needs_browser
def test_an_answer_is_stopped_and_given_again(person: Person) -> None:
    person.say("one")
    person.give("because <b>", "reasoning_content")
    person.give("half an")
    assert person.page.run("document.querySelector('.thought').open") is False
    person.page.press("#stop")
    person.page.wait_for("answering === null")
    assert person.turns() == ["user: one", "assistant: half an"]
    assert "stopped" in person.page.run("document.querySelector('.assistant .note').textContent")
    person.press("Regenerate")
    person.give("whole")
    person.finish()
    assert person.turns() == ["user: one", "assistant: whole"]
    note = person.page.run("document.querySelector('.assistant .note').textContent")
    assert "7 tokens" in note and "tok/s" in note
    assert person.page.run("$('used-context').textContent") == "context: 1,234 of 1,024 tokens"
    person.say("two")
    person.give("second")
    person.finish()
    assert person.sent() == [["one"], ["one"], ["one", "whole", "two"]]


@needs_browser
def test_a_message_is_edited(person: Person) -> None:
    for number, text in enumerate(("one", "two")):
        person.say(text)
        person.give(f"answer {number}")
        person.finish()
    person.page.run("document.querySelectorAll('#log .user button')[1].click()")
    person.page.run("document.querySelector('#log .user textarea').value = 'uno'")
    person.press("Send")
    person.give("risposta")
    person.finish()
    assert person.turns() == ["user: uno", "assistant: risposta"]
    person.page.run("replies.push('no room')")
    person.page.run("document.querySelectorAll('#log .user button')[1].click()")
    person.page.run("document.querySelector('#log .user textarea').value = 'dos'")
    person.press("Send")
    person.page.wait_for("document.querySelector('.error') !== null")
    assert person.turns()[:2] == ["user: uno", "assistant: risposta"] and person.box == "dos"


@needs_browser
def test_what_is_refused_is_not_lost(person: Person) -> None:
    person.page.run("replies.push('too long <i>')")
    person.say("a long story")
    person.page.wait_for("document.querySelector('.error') !== null")
    assert person.turns() == ["error: too long <i>"] and person.box == "a long story"
    person.press("Retry")
    person.give("now it fits")
    person.finish()
    assert person.turns() == ["user: a long story", "assistant: now it fits"] and person.box == ""
    assert person.sent() == [["a long story"], ["a long story"]]
    person.say("more")
    person.give("half")
    person.page.run("cut()")
    person.page.wait_for("answering === null")
    assert person.turns()[-1] == "assistant: half"
    assert "not reachable" in person.page.run("$('log').lastChild.textContent")


@needs_browser
def test_a_new_chat_during_an_answer_begins_empty(person: Person) -> None:
    person.say("old")
    person.give("old answer")
    person.page.press("#new")
    person.page.wait_for("answering === null")
    assert person.turns() == []
    person.say("new")
    person.give("new answer")
    person.finish()
    assert person.sent() == [["old"], ["new"]]
    titles = "[...document.querySelectorAll('#list .open')].map(each => each.textContent)"
    assert person.page.run(titles) == ["new", "old"]
    person.page.run("document.querySelectorAll('#list .open')[1].click()")
    assert person.turns() == ["user: old", "assistant: old answer"]


@needs_browser
def test_conversations_and_settings_are_kept(person: Person, live: Any) -> None:
    person.page.run("$('settings').open = true")
    person.page.type("#system", "Be brief")
    person.page.type("#top_k", "3")
    person.page.run("$('thinking').value = 'off'")
    person.page.run("$('settings').dispatchEvent(new Event('change'))")
    person.say("one")
    person.give("yes")
    person.finish()
    (body,) = person.page.run("sent")
    assert body["messages"][0] == {"role": "system", "content": "Be brief"} and body["top_k"] == 3
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and "top_p" not in body
    person.page.run("document.querySelector('#list [title=Rename]').click()")
    person.page.run("document.querySelector('#list input').value = 'A name'")
    person.page.run("document.querySelector('#list input').dispatchEvent(new Event('change'))")
    person.page.call("Page.reload")
    person.page.wait_for("document.querySelector('#list .open')?.textContent === 'A name'")
    assert person.turns() == [] and person.page.run("$('top_k').value") == "3"
    person.page.run("document.querySelector('#list .open').click()")
    assert person.turns() == ["user: one", "assistant: yes"]
    assert person.page.run("$('system').value") == "Be brief"
    person.page.run("document.querySelector('#list [title=Delete]').click()")
    assert person.turns() == [] and person.page.run("$('list').children.length") == 0


@needs_browser
def test_a_phone_keeps_stop_on_the_screen_and_readers_where_they_are(
    browser: chromium.Browser, live: Any
) -> None:
    page = browser.open(f"{live.url}/", width=390, height=844)
    person = Person(page)
    person.say("tell me")
    person.give("a long story\n\n" * 200 + "```\n" + "wide " * 100 + "\n```\n\n" + "w" * 300)
    bottom = page.run("$('stop').getBoundingClientRect().bottom")
    assert 0 < bottom <= 844 and page.run("$('stop').checkVisibility()")
    assert page.run("document.documentElement.scrollWidth") <= 390
    gap = "$('log').scrollHeight - $('log').scrollTop - $('log').clientHeight"
    assert page.run(gap) < 40  # follows
    page.run("$('log').scrollTop = 100")
    person.give("and more")
    assert page.run("$('log').scrollTop") == 100
    page.press("#show-live")
    assert page.run("$('live').checkVisibility()") and not page.run("$('past').checkVisibility()")
    page.press("#show-live")
    assert not page.run("$('live').checkVisibility()")
    person.finish()
    assert page.faults == []
    page.call("Page.close")


@needs_browser
def test_one_of_several_models_is_chosen(person: Person) -> None:
    page = person.page
    page.run("""{
      const plain = window.fetch;
      window.asked = [];
      window.fetch = (path, options) => {
        asked.push(path);
        if (path !== "v1/models") return plain(path, options);
        const of = (id, value) => ({ id, status: { value } });
        const data = [of("tiny", "loaded"), of("b", "unloaded")];
        return Promise.resolve(new Response(JSON.stringify({ data })));
      };
      models = [];
    }""")
    page.run("poll()")
    assert page.run("$('models').checkVisibility()")
    options = page.run("[...$('models').options].map(each => each.textContent)")
    assert options == ["tiny", "b (unloaded)"]
    page.run("$('models').value = 'b'")
    page.run("$('models').dispatchEvent(new Event('change'))")
    page.run("poll()")
    assert page.run("asked.includes('live/plan?model=b')")
    assert page.run("bodyOf(shown).model") == "b" and "model=b" in page.run("location.search")


@needs_browser
@pytest.mark.slow
def test_a_message_loads_the_model_that_is_chosen(
    browser: chromium.Browser, plan: Plan, serve: Callable[..., Any]
) -> None:
    with serve(Models([Model(plan, Settings(name=name)) for name in "ab"])) as found:
        page = browser.open(f"{found.url}/?model=b&ask=Who+is+he&temperature=0")
        page.wait_for("document.querySelector('.turn.assistant .note')?.textContent")
        assert [model.loads for model in found.server.models] == [0, 1]
    assert page.run("$('models').options[0].textContent") == "a (unloaded)"
    assert page.run("document.title") == "b · hmc" and page.faults == []
    page.call("Page.close")
