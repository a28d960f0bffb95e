"""Counts how often each expert is chosen, for placements learned from real text; hides how a text
is cut into a part to learn from and one held out.

The file is the one that `hmc compile --routing-profile` reads:

    {"format": "hmc-routing", "learn": {"tokens": N, "counts": {"3": [c0, c1, ..], ..}},
     "held_out": {"tokens": M, "counts": {..}}}

Of several generations every other one is held out, since hot experts of one text are often cold in
the next. Of a single one, its second half is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.errors import UsageError

_BLOCKS = 64

Counts = npt.NDArray[np.int64]


class RoutingRecorder:
    """What an executor calls after every router; `begin` before each generation."""

    def __init__(self) -> None:
        self._finished: list[_Text] = []
        self._text = _Text()

    def begin(self) -> None:
        """What follows belongs to another text than what came before."""
        if self._text.tokens:
            self._finished.append(self._text)
        self._text = _Text()

    def count(self, layer: int, experts: int, chosen: npt.NDArray[np.int32]) -> None:
        """`chosen` i32 [tokens, top_k]: the experts that the next tokens of the text go to."""
        self._text.count(layer, experts, chosen)

    def as_json(self) -> dict[str, Any]:
        """Both parts; `UsageError` when there is too little for two."""
        texts = [*self._finished, *([self._text] if self._text.tokens else [])]
        if len(texts) > 1:
            parts = [_sum([each.whole() for each in texts[first::2]]) for first in (0, 1)]
        elif texts:
            parts = list(texts[0].halves())
        if not texts or not all(tokens for tokens, _ in parts):
            raise UsageError(
                "routing of fewer than two tokens was recorded: nothing to learn and to hold out"
            )
        learn, held_out = (
            {
                "tokens": tokens,
                "counts": {str(layer): found.tolist() for layer, found in sorted(counts.items())},
            }
            for tokens, counts in parts
        )
        return {"format": "hmc-routing", "learn": learn, "held_out": held_out}


Part = tuple[int, dict[int, Counts]]


class _Text:
    """One text's counts in blocks of as many tokens as make at most `_BLOCKS` of them: where its
    half will be is known at its end alone.
    """

    def __init__(self) -> None:
        self._size = 1
        self._seen: dict[int, int] = {}
        self._counts: dict[int, Counts] = {}

    @property
    def tokens(self) -> int:
        """Tokens that all routers have seen (a generation may end between two layers)."""
        return min(self._seen.values(), default=0)

    def count(self, layer: int, experts: int, chosen: npt.NDArray[np.int32]) -> None:
        first = self._seen.get(layer, 0)
        last = first + len(chosen)
        while last > self._size * _BLOCKS:
            self._widen()
        counts = self._counts.setdefault(layer, np.zeros((_BLOCKS, experts), np.int64))
        blocks = np.arange(first, last) // self._size
        np.add.at(counts, (blocks[:, None], chosen), 1)
        self._seen[layer] = last

    def whole(self) -> Part:
        return self.tokens, {layer: found.sum(axis=0) for layer, found in self._counts.items()}

    def halves(self) -> tuple[Part, Part]:
        used = -(-self.tokens // self._size)
        half = used // 2
        first = {layer: found[:half].sum(axis=0) for layer, found in self._counts.items()}
        second = {layer: found[half:].sum(axis=0) for layer, found in self._counts.items()}
        return (half * self._size, first), (self.tokens - half * self._size, second)

    def _widen(self) -> None:
        for layer, found in self._counts.items():
            wider = np.zeros_like(found)
            wider[: _BLOCKS // 2] = found[::2] + found[1::2]
            self._counts[layer] = wider
        self._size *= 2


def _sum(parts: list[Part]) -> Part:
    total: dict[int, Counts] = {}
    for _, counts in parts:
        for layer, found in counts.items():
            total[layer] = total.get(layer, 0) + found
    return sum(tokens for tokens, _ in parts), total
