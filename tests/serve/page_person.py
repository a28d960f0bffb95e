"""Somebody at the built-in page, and the server's side of the chat."""

from __future__ import annotations

import json

import browser as chromium
import pytest

needs_browser = pytest.mark.skipif(
    chromium.found is None, reason=f"none of {', '.join(chromium.NAMES)} is installed"
)

READY = "document.getElementById('state').dataset.state === 'ready'"

REPLIES = """
{
  const plain = window.fetch, encoder = new TextEncoder();
  window.sent = [];
  window.replies = [];
  window.fetch = (path, options = {}) => {
    if (path !== "v1/chat/completions") return plain(path, options);
    sent.push(JSON.parse(options.body));
    const refusal = replies.shift();
    if (refusal) {
      const body = JSON.stringify({ error: { message: refusal } });
      return Promise.resolve(new Response(body, { status: 400 }));
    }
    let control;
    const body = new ReadableStream({ start: found => { control = found; } });
    const event = found => control.enqueue(encoder.encode(`data: ${JSON.stringify(found)}\\n\\n`));
    window.give = delta => event({ choices: [{ delta, finish_reason: null }] });
    window.finish = () => {
      event({ choices: [{ delta: {}, finish_reason: "stop" }] });
      event({ choices: [], usage: { completion_tokens: 7, total_tokens: 1234 } });
      control.enqueue(encoder.encode("data: [DONE]\\n\\n"));
      control.close();
    };
    window.cut = () => control.error(new TypeError("network error"));
    const abort = () => control.error(new DOMException("", "AbortError"));
    options.signal.addEventListener("abort", abort);
    return Promise.resolve(new Response(body));
  };
}
"""
"""Answers to chats come from the test: refusals in `replies`, else `give`, `finish` and `cut`."""


class Person:
    """Somebody at the page, and the server's side of the chat."""

    def __init__(self, page: chromium.Page) -> None:
        self.page = page
        page.wait_for(READY)
        page.run(REPLIES)

    def say(self, text: str) -> None:
        self.page.type("#input", text)
        self.page.enter()

    def give(self, text: str, kind: str = "content") -> None:
        self.page.run(f"give({json.dumps({kind: text})})")
        self.page.wait_for(f"$('log').lastChild.textContent.includes({json.dumps(text[-20:])})")

    def finish(self) -> None:
        self.page.run("finish()")
        self.page.wait_for("answering === null")

    def turns(self) -> list[str]:
        """Kind and text of each turn, without notes."""
        found: list[str] = self.page.run(
            "[...document.querySelectorAll('#log .turn')].map(turn => turn.className.slice(5)"
            " + ': ' + (turn.querySelector('.said') || turn.firstChild).textContent)"
        )
        return found

    def sent(self) -> list[list[str]]:
        """The texts of each request."""
        found: list[list[str]] = self.page.run("sent.map(b => b.messages.map(m => m.content))")
        return found

    def press(self, text: str) -> None:
        """The last button of a name."""
        self.page.run(
            f"[...document.querySelectorAll('#log button')].filter(b => b.textContent ==="
            f" {json.dumps(text)}).pop().click()"
        )

    @property
    def box(self) -> str:
        return str(self.page.run("$('input').value"))
