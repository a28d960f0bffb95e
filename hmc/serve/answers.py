"""OpenAI's JSON for parts of answers: tool calls and log-probabilities."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from hmc.runtime.tokens.requests import TokenLogprob
from hmc.serve.tools import Call
from hmc.serve.vocabulary import Vocabulary


def tool_calls(calls: Sequence[Call], first: int = 0, *, indexed: bool) -> list[dict[str, Any]]:
    """Calls as an answer lists them; in chunks with their `index`."""
    return [
        {
            **({"index": first + number} if indexed else {}),
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for number, call in enumerate(calls)
    ]


class Names:
    """Tokens by name, for lists of log-probabilities; `id:<n>` without a tokenizer."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary

    def text(self, token: int) -> str:
        """A token's text."""
        return self._vocabulary.text(token) if self._vocabulary else f"id:{token}"

    def chat(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`logprobs` of a chat choice."""
        return {
            "content": [
                {
                    **self._entry(each.token, each.logprob),
                    "top_logprobs": [self._entry(*pair) for pair in each.top],
                }
                for each in entries
            ],
            "refusal": None,
        }

    def completion(
        self, entries: Sequence[TokenLogprob | int], offset: int
    ) -> tuple[dict[str, Any], int]:
        """`logprobs` of a completion choice whose text begins at `offset`, and where it ends.

        The first token of a prompt, given as its id, has no log-probability.
        """
        result: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for entry in entries:
            known = isinstance(entry, TokenLogprob)
            number = entry.token if isinstance(entry, TokenLogprob) else entry
            token = self.text(number)
            result["tokens"].append(token)
            result["text_offset"].append(offset)
            result["token_logprobs"].append(entry.logprob if known else None)  # type: ignore[union-attr]
            result["top_logprobs"].append(self._top(entry) if known else None)  # type: ignore[arg-type]
            if self._vocabulary is not None and not self._vocabulary.hidden(number):
                offset += len(token)
        return result, offset

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text, the likeliest where several tokens share one; the chosen token is among them."""
        found: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            found.setdefault(self.text(token), logprob)
        return found

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        known = self._vocabulary
        return {
            "token": self.text(token),
            "logprob": logprob,
            "bytes": list(known.bytes(token)) if known else None,
        }
