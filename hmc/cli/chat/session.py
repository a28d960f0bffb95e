"""What has been said, what of it fits the context, and one answer; hides what the cache keeps and
which part of an answer is a thought.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.cli.chat.screen import Screen
from hmc.closing import Closing
from hmc.errors import UsageError
from hmc.runtime.engine import Engine
from hmc.runtime.routing import RoutingRecorder
from hmc.runtime.tokens.generation import Stream, Timings
from hmc.runtime.tokens.kept import Kept
from hmc.runtime.tokens.prompts import prompt_ids, sampling_params
from hmc.runtime.tokens.text import Text
from hmc.serve.reasoning import begun_by, markers_of

_ROOM = 4
"""A prompt leaves one part in so many of the context to its answer, or as much as is asked for."""
_AFTER_CUT = 2
"""When turns have to go, so many that the prompt fits one part in so many of the context: what is
left is computed again, which should not be done every turn."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """Figures of one answer: `cached` tokens of the prompt were in the cache already."""

    cached: int
    times: Timings
    reason: str

    @property
    def computed(self) -> int:
        """Tokens of the prompt that were computed."""
        return self.times.prompt_tokens - self.cached


class Session(Closing):
    """A conversation with an engine whose checkpoint has a chat template. `messages` is all that
    was said, `options` how answers are drawn (`settings.KINDS`).
    """

    def __init__(
        self,
        engine: Engine,
        text: Text,
        screen: Screen,
        options: Mapping[str, Any],
        system: str = "",
        routing: RoutingRecorder | None = None,
    ) -> None:
        """Raises `UsageError` where the chat template takes no system message."""
        assert text.chat is not None
        self.screen = screen
        self.options = dict(options)
        self.messages: list[Message] = []
        self.system = ""
        self.turns: list[Turn] = []
        self._engine, self._text, self._routing = engine, text, routing
        self._markers = markers_of(text.chat)
        self._kept = Kept(engine.executor)
        self._first = 0  # of the messages, the first that prompts show
        self.begin_with(system)

    @property
    def context(self) -> int:
        """Tokens that the plan's context holds."""
        return self._engine.plan.limits.max_context

    @property
    def held(self) -> int:
        """Tokens of the conversation in the cache."""
        return self._kept.tokens

    @property
    def left_out(self) -> int:
        """Messages that no longer fit the context."""
        return self._first

    def begin_with(self, system: str) -> None:
        """Say a system message before everything; `UsageError` where the template takes none."""
        before, self.system = self.system, system
        try:
            self._encoded([{"role": "user", "content": "?"}])
        except UsageError:
            self.system = before
            raise

    def draw_by(self, options: Mapping[str, Any]) -> None:
        """Change the settings; `UsageError` for a value that is out of range."""
        sampling_params(self._text, self._sampling(options))
        self.options = dict(options)

    def start_with(self, messages: list[Message]) -> None:
        """Go on from another conversation, [] for a new one; a system message may come first.
        `UsageError` where the chat template refuses it.
        """
        first = messages[:1] if messages and messages[0]["role"] == "system" else []
        system = first[0]["content"] if first else self.system
        rest = messages[len(first) :]
        before, self.system = self.system, system
        try:
            if rest:
                self._encoded(rest)
        except UsageError:
            self.system = before
            raise
        self.messages, self._first = list(rest), 0

    @property
    def whole(self) -> list[Message]:
        """All messages, the system message first."""
        return [*self._system(), *self.messages]

    def ask(self, text: str) -> None:
        """Say something and answer it; where nothing is answered, it was not said."""
        with self._unless_answered():
            self.messages.append({"role": "user", "content": text})
            self._answer()

    def retry(self) -> None:
        """Answer once more what was said last; where nothing is answered, the old answer stands."""
        with self._unless_answered():
            if self.messages and self.messages[-1]["role"] == "assistant":
                self.messages.pop()
            if not self.messages:
                raise UsageError("/retry: nothing has been said yet")
            self._answer()

    def close(self) -> None:
        """Give the place in the cache back."""
        self._kept.close()

    @contextmanager
    def _unless_answered(self) -> Iterator[None]:
        """Messages are as before after an error, and where no answer came."""
        before = list(self.messages)
        try:
            yield
        except BaseException:
            self.messages = before
            raise
        if self.messages[-1]["role"] != "assistant":
            self.messages = before
            self.screen.note("nothing was answered: the message is taken back")

    def _answer(self) -> None:
        """Compute and show one answer, and keep it, unless it ended before it began."""
        ids, thinks = self._prompt()
        if self._routing is not None:
            self._routing.begin()
        finder = self._markers.finder(begun=thinks) if self._markers else None
        shown = self._markers.shown if self._markers else ()
        thought = said = ""
        options = {"max_new_tokens": self.context, **self._sampling(self.options)}
        with (
            self._engine.stream(ids, kept=self._kept, shown=shown, **options) as stream,
            _interrupting(stream),
        ):
            for piece in stream:
                more, text = finder.push(piece.text) if finder else ("", piece.text)
                thought, said = thought + more, said + text
                self._show(more, text)
        more, text = finder.flush() if finder else ("", "")
        thought, said = thought + more, said + text
        self._show(more, text)
        self.screen.end()
        result = stream.result
        self.turns.append(Turn(stream.cached_tokens, result.timings, result.finish_reason))
        if result.finish_reason == "length":
            full = len(ids) + len(result.token_ids) > self.context
            why = "the context is full" if full else "max_new_tokens is reached"
            self.screen.note(f"cut off: {why}")
        if result.finish_reason != "cancelled" or thought or said:
            kept = {"reasoning_content": thought, "reasoning": thought} if thought else {}
            self.messages.append({"role": "assistant", "content": said, **kept})

    def _show(self, thought: str, text: str) -> None:
        self.screen.thought(thought)
        self.screen.text(text)

    def _prompt(self) -> tuple[npt.NDArray[np.int32], bool]:
        """The token ids of what fits the context, the oldest turns left out where not all does; and
        whether the answer begins within a thought.
        """
        most = self.options.get("max_new_tokens", self.context)
        limit = self.context - min(most, self.context // _ROOM)
        gone = 0
        while True:
            ids = self._encoded(self.messages[self._first :])
            after = self._second_turn()
            if len(ids) <= limit or after is None:
                break
            limit = self.context // _AFTER_CUT
            gone += after - self._first
            self._first = after
        if gone:
            self.screen.note(
                f"the context of {self.context} tokens is full: the {gone} oldest messages are no"
                " longer shown to the model"
            )
        shown = self._text.showing(self._markers.shown if self._markers else ())
        thinks = begun_by(self._markers, shown, ids)
        return prompt_ids(ids, self._text, self._engine.plan), thinks

    def _second_turn(self) -> int | None:
        """Where the second of the turns begins that prompts show; None where there is one alone."""
        later = range(self._first + 1, len(self.messages))
        return next((at for at in later if self.messages[at]["role"] == "user"), None)

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _encoded(self, messages: list[Message]) -> list[int]:
        thinking = self.options.get("thinking")
        variables = {} if thinking is None else {"enable_thinking": thinking}
        return self._text.encode_chat([*self._system(), *messages], variables=variables)

    @staticmethod
    def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name != "thinking"}


@contextmanager
def _interrupting(stream: Stream) -> Iterator[None]:
    """The first Ctrl-C ends an answer after the call under way, a second one at once."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stream.cancel()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
