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
        self._texts = [_Text()]

    def begin(self) -> None:
        """What follows belongs to another text than what came before."""
        if self._texts[-1].tokens:
            self._texts.append(_Text())

    def count(self, layer: int, experts: int, chosen: npt.NDArray[np.int32]) -> None:
        """`chosen` i32 [tokens, top_k]: the experts that the next tokens of the text go to."""
        self._texts[-1].count(layer, experts, chosen)

    def as_json(self) -> dict[str, Any]:
        """Both parts; `UsageError` when there is too little for two."""
        texts = [text for text in self._texts if text.tokens]
        parts = [[text.part(0, _BLOCKS) for text in texts[first::2]] for first in (0, 1)]
        if len(texts) == 1:
            half = texts[0].blocks // 2
            parts = [[texts[0].part(0, half)], [texts[0].part(half, _BLOCKS)]]
        learn, held_out = (
            {"tokens": sum(tokens for tokens, _ in part), "counts": _sum(part)} for part in parts
        )
        if not learn["tokens"] or not held_out["tokens"]:
            raise UsageError(
                "routing of fewer than two tokens was recorded: nothing to learn and to hold out"
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

    @property
    def blocks(self) -> int:
        """Blocks that they begin."""
        return -(-self.tokens // self._size)

    def count(self, layer: int, experts: int, chosen: npt.NDArray[np.int32]) -> None:
        first = self._seen.get(layer, 0)
        last = first + len(chosen)
        while last > self._size * _BLOCKS:
            self._size *= 2
            for found in self._counts.values():
                found[: _BLOCKS // 2] = found[::2] + found[1::2]
                found[_BLOCKS // 2 :] = 0
        counts = self._counts.setdefault(layer, np.zeros((_BLOCKS, experts), np.int64))
        blocks = np.arange(first, last) // self._size
        np.add.at(counts, (blocks[:, None], chosen), 1)
        self._seen[layer] = last

    def part(self, first: int, last: int) -> Part:
        """Tokens of some blocks, and by layer how often they went to each expert."""
        start, stop = (min(block * self._size, self.tokens) for block in (first, last))
        counts = {layer: found[first:last].sum(axis=0) for layer, found in self._counts.items()}
        return stop - start, counts


def _sum(parts: list[Part]) -> dict[str, list[int]]:
    layers = sorted({layer for _, counts in parts for layer in counts})
    found = {n: [counts[n] for _, counts in parts if n in counts] for n in layers}
    return {str(layer): np.sum(each, axis=0).tolist() for layer, each in found.items()}
