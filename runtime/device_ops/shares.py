"""Which rows of a call each step works on, and what it must know of them; hides ranks, lanes, spans
of sequences and where a token's cache row is.

A call is the tokens of one run of a phase. A step works on a *share* of them:

    all      every token, in the order of the call
    rank     of 2R equal pieces (edges i * T // 2R) those numbered r and 2R - 1 - r, in this order:
             early and late pieces together cost every rank the same attention
    lane     the l-th of L equal runs of the call's tokens
    wanted   the rows whose logits are asked for
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from hmc.errors import ExecutionError
from hmc.runtime.memory.kv import KVCache

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Share:
    """A share of a call's tokens; `of` ranks or lanes there are."""

    kind: Literal["all", "rank", "lane", "wanted"] = "all"
    index: int = 0
    of: int = 1

    def pieces(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """Runs (first, last) of the call's tokens, in the order of the share's rows; `wanted` has
        none.
        """
        if self.kind == "all":
            return ((0, tokens),)
        if self.kind == "lane":
            return ((tokens * self.index // self.of, tokens * (self.index + 1) // self.of),)
        if self.kind == "rank":
            edges = [tokens * i // (2 * self.of) for i in range(2 * self.of + 1)]
            numbers = (self.index, 2 * self.of - 1 - self.index)
            return tuple((edges[i], edges[i + 1]) for i in numbers)
        raise ValueError("wanted rows are no runs of the call's tokens")

    def runs(self, tokens: int, part: slice) -> Iterator[tuple[slice, slice]]:
        """Of rows `part` of the share (as far as it has them) those that follow each other in the
        call: where they are in the share, and where in the call."""
        start = 0
        for first, last in self.pieces(tokens):
            low, high = max(part.start, start), min(part.stop, start + last - first)
            if low < high:
                yield slice(low, high), slice(first + low - start, first + high - start)
            start += last - first


ALL, WANTED = Share(), Share("wanted")


@dataclass(frozen=True)
class Span:
    """Rows [first, last) of a share, of one sequence, at consecutive positions from `position`."""

    first: int
    last: int
    position: int


@dataclass(frozen=True)
class Rows:
    """The rows of a share as a device's ops need them.

    `positions` i64 [count]; `slots` i64 [count], each token's row of the flat cache (block *
    block_size + place); `sequences` i64 [count], the slot of each token's sequence, where layers
    keep states a sequence. A call of one sequence has `spans` and no `reach`; one of many sequences
    has `reach` i64 [count, longest], the cache rows each token sees (padded with 0), and `lengths`
    i64 [count], how many they are. So has a call of `Fixed` tensors, whose shapes must not grow.
    """

    count: int
    positions: torch.Tensor
    slots: torch.Tensor
    spans: tuple[Span, ...]
    reach: torch.Tensor | None
    lengths: torch.Tensor | None
    sequences: torch.Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One run of a phase.

    `ids`, `positions`, `tables` (block table row of each token) i32 [T]; `wanted` i32 [rows],
    indices of the tokens whose logits are wanted. Where all tokens are of one sequence (`single`),
    `past` ones precede them. `host_slots` and `slots` i64 [T] are the cache rows of the tokens, the
    latter on the home GPU, `past_slots` i64 [past] there those of the past. `rows` are on the
    devices that read them; `picked` are the `wanted` rows within the share that holds them.
    """

    ids: Ints
    positions: Ints
    tables: Ints
    wanted: Ints
    single: bool
    past: int
    host_slots: npt.NDArray[np.int64]
    slots: torch.Tensor
    rows: Mapping[tuple[Share, str], Rows]
    past_slots: torch.Tensor
    picked: Mapping[str, torch.Tensor]

    @property
    def tokens(self) -> int:
        """Tokens of the call."""
        return len(self.ids)

    def count(self, share: Share) -> int:
        """Rows of a share."""
        if share.kind == "wanted":
            return len(self.wanted)
        return sum(last - first for first, last in share.pieces(self.tokens))


@dataclass(frozen=True)
class Needs:
    """What calls of a phase must bring along: shares by device name, and the share that the wanted
    rows are picked from, by device. The device `home` has the cache.
    """

    home: str

    shares: frozenset[tuple[Share, str]]
    picked: Mapping[str, Share]


class Fixed:
    """Index tensors that stay where they are: call after call of as many tokens writes them anew.

    `longest` positions are what `reach` is padded to. For works that know only where tensors lie
    (graphs); one call at a time, a new one makes the tensors of the one before its own.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._kept: dict[Hashable, torch.Tensor] = {}

    def sent(self, key: Hashable, values: torch.Tensor, place: torch.device) -> torch.Tensor:
        """The tensor called `key`, with new values of the same shape."""
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = torch.empty_like(values, device=place)
        return kept.copy_(values, non_blocking=True)


def make_call(
    kv: KVCache,
    needs: Needs,
    places: Mapping[str, torch.device],
    ids: Ints,
    positions: Ints,
    tables: Ints,
    wanted: Ints,
    *,
    ranks: int = 1,
    lanes: int = 1,
    fixed: Fixed | None = None,
) -> Call:
    """A call, with its index tensors on the devices `places` names; new ones, or `fixed`.

    Raises `ExecutionError` where the tokens cannot be shared: fewer than two pieces a rank, several
    sequences over ranks, one sequence over lanes, wanted rows that no step can reach.
    """
    tokens = len(ids)
    single = bool((tables == tables[0]).all() and (np.diff(positions) == 1).all())
    if ranks > 1 and (not single or tokens < 2 * ranks):
        raise ExecutionError(
            f"{tokens} tokens cannot be shared by {ranks} GPUs: one sequence and at least"
            f" {2 * ranks} tokens are needed"
        )
    if len(np.unique(tables)) < tokens and (lanes > 1 or not single):
        raise ExecutionError("tokens of one sequence must follow each other in a call of their own")
    single = single and lanes == 1 and fixed is None
    block = kv.block
    slots = kv.tables[tables, positions // block].astype(np.int64) * block + positions % block
    past, home = int(positions[0]) if single else 0, needs.home
    slotted = kv.layout.bytes_per_sequence > 0

    def sent(values: npt.NDArray[np.int64], device: str, *key: Hashable) -> torch.Tensor:
        found = torch.from_numpy(np.ascontiguousarray(values))
        if fixed is None:
            return found.to(places[device], non_blocking=True)
        return fixed.sent((device, *key), found, places[device])

    def rows(share: Share, device: str) -> Rows:
        pieces = share.pieces(tokens)
        at = np.concatenate([np.arange(first, last) for first, last in pieces])
        reach = lengths = None
        spans: list[Span] = []
        if single:
            start = 0
            for first, last in pieces:
                spans.append(Span(start, start + last - first, int(positions[first])))
                start += last - first
        elif len(at):
            seen = positions[at].astype(np.int64) + 1
            steps = np.arange(seen.max() if fixed is None else fixed.longest)
            found = kv.tables[tables[at][:, None], steps[None] // block].astype(np.int64)
            found = np.where(steps[None] < seen[:, None], found * block + steps[None] % block, 0)
            reach = sent(found, device, "reach", share)
            lengths = sent(seen, device, "lengths", share)
        return Rows(
            len(at),
            sent(positions[at].astype(np.int64), device, "positions", share),
            sent(slots[at], device, "slots", share),
            tuple(span for span in spans if span.last > span.first),
            reach,
            lengths,
            sent(tables[at].astype(np.int64), device, "sequences", share) if slotted else None,
        )

    before = np.arange(past)
    seen = kv.tables[tables[0], before // block].astype(np.int64) * block + before % block
    call = Call(
        ids,
        positions,
        tables,
        wanted,
        single,
        past,
        slots,
        sent(slots, home, "slots"),
        {(share, device): rows(share, device) for share, device in needs.shares},
        sent(seen, home, "past"),
        {
            device: sent(_picked(wanted, picked, tokens), device, "picked")
            for device, picked in needs.picked.items()
        },
    )
    for device in {place for place in places.values() if place.type == "cuda"}:
        # one wait for all tensors: the streams of steps do not wait for them
        torch.cuda.current_stream(device).synchronize()
    return call


def _picked(wanted: Ints, share: Share, tokens: int) -> npt.NDArray[np.int64]:
    """Where the `wanted` rows of the call are among the rows of a share."""
    at = np.full(tokens, -1, np.int64)
    start = 0
    for first, last in share.pieces(tokens):
        at[first:last] = np.arange(start, start + last - first)
        start += last - first
    found = at[wanted]
    if (found < 0).any():
        raise ExecutionError(
            f"logits are wanted of token {int(wanted[found < 0][0])}, which another GPU holds: a"
            " phase shared by GPUs gives those of the last piece of a prompt"
        )
    return found


def of_share(whole: torch.Tensor, share: Share, tokens: int, part: slice) -> torch.Tensor:
    """Rows `part` of a share of `whole` [tokens, width]; a view where they follow each other."""
    runs = [whole[run] for _, run in share.runs(tokens, part)]
    return runs[0] if len(runs) == 1 else torch.cat(runs or [whole[:0]])
