"""Requests for tokens on their way, whichever interface asked for them: what becomes known of their
choices, told apart into thoughts, text and calls. Writers (writing.py) put it into words.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.tokens.requests import TokenLogprob, Update
from hmc.serve.delivery import Hub, Replies
from hmc.serve.metrics import Latencies
from hmc.serve.prepare import Prepared
from hmc.serve.reasoning import ThoughtFinder
from hmc.serve.service import Service
from hmc.serve.tools import Call, CallFinder


@dataclass
class Choice:
    """What one choice has said so far; `thought_tokens` of its tokens were a thought. `reason` says
    why it has ended: "stop", "length" or "tool_calls".
    """

    finder: CallFinder | None = None
    thoughts: ThoughtFinder | None = None
    most_calls: int | None = None
    text: str = ""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scored: Sequence[TokenLogprob] | None = None
    thought_tokens: int = 0
    reason: str | None = None
    begun: bool = False

    def take(self, update: Update) -> tuple[str, str, list[Call]]:
        """Add an update; the thought, the text and the calls that became certain with it."""
        self.tokens += update.token_ids
        self.logprobs += update.logprobs
        if update.prompt_logprobs is not None:
            self.scored = update.prompt_logprobs
        ends = update.finish_reason is not None
        thought, text, calls = "", update.piece, list[Call]()
        if self.thoughts is not None:
            within = self.thoughts.within
            thought, text = self.thoughts.push(text)
            if within or self.thoughts.within or thought:
                self.thought_tokens += len(update.token_ids)
            last = self.thoughts.flush() if ends else ("", "")
            thought, text = thought + last[0], text + last[1]
        if self.finder is not None:
            text, calls = self.finder.push(text)
            if ends:
                rest, left = self.finder.flush()
                text, calls = text + rest, calls + left
            if self.most_calls is not None:
                calls = calls[: self.most_calls - len(self.calls)]
        self.thought += thought
        self.text += text
        self.calls += calls
        if ends:
            called = update.finish_reason == "stop" and self.calls
            self.reason = "tool_calls" if called else update.finish_reason
        return thought, text, calls


@dataclass(frozen=True)
class News:
    """What has come of a choice, by its number, since the last: `first` when nothing was said of it
    before, with its `reason` once it has ended.
    """

    index: int
    first: bool
    thought: str
    text: str
    calls: Sequence[Call]
    logprobs: Sequence[TokenLogprob]
    tokens: Sequence[int]
    reason: str | None


class Answering:
    """One HTTP request for tokens on its way; `cached_tokens` of its prompts were known already."""

    def __init__(
        self, service: Service, hub: Hub, latencies: Latencies, prepared: Prepared
    ) -> None:
        self._service, self._latencies = service, latencies
        self._replies = Replies(hub)
        self.prepared = prepared
        self.choices = [
            Choice(prepared.finder(), prepared.thought_finder(), prepared.most_calls)
            for _ in prepared.requests
        ]
        self.cached_tokens = 0

    def submit(self, scheduler: Scheduler) -> None:
        """Begin, in places that the caller holds; raises what the scheduler refuses with."""
        self._replies.submit(scheduler, self.prepared.requests, held=True)

    def cancel(self) -> None:
        """End what has not ended."""
        self._replies.cancel()

    async def news(self) -> AsyncGenerator[News, None]:
        """What becomes known until all choices have ended; cancels what is left when it is closed
        early. Raises the error that a choice ended with.
        """
        try:
            async for index, update in self._replies.updates():
                choice = self.choices[index]
                times = update.timings
                if times is not None and times.new_tokens and update.finish_reason != "cancelled":
                    self._latencies.observe(times)
                    self._service.ttft.append(times.ttft_s)
                whole = index % self.prepared.choices_per_prompt == 0  # of each prompt one
                if update.finish_reason is not None and whole:
                    self.cached_tokens += update.cached_tokens
                thought, text, calls = choice.take(update)
                first, choice.begun = not choice.begun, True
                said = (thought, text, calls, update.logprobs, update.token_ids, choice.reason)
                yield News(index, first, *said)
        finally:
            self._replies.cancel()

    def told(self) -> list[News]:
        """All that has come of every choice, as if at once."""
        return [
            News(i, True, c.thought, c.text, c.calls, c.logprobs, c.tokens, c.reason)
            for i, c in enumerate(self.choices)
        ]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return self.prepared.prompt_tokens

    @property
    def new_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(len(choice.tokens) for choice in self.choices)

    def stop_met(self, index: int) -> str | None:
        """The stop string that ended a choice; None when none did."""
        return self.prepared.requests[index].ends.stop.met
