"""Attention over a window and over compressed rows (DeepSeek-V4), as one node, and the functions
that its reference is made of; devices compute by them too (runtime/device_ops/compressed.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hmc.blocks.base import Block, parameter, sibling
from hmc.blocks.sparse import index_scores
from hmc.graph import Attr, WeightSpec, attrs
from hmc.ops.compressed import fields

Attrs = Mapping[str, Any]


@dataclass(frozen=True)
class Compression:
    """One row for `ratio` tokens, of two windows of so many where they `overlap`; normed with
    `eps`, its last 2 len(rope) elements turned by `rope` at its first token's position. Weights are
    `<name>.ape` and `<name>.norm.weight` beside the attention.
    """

    ratio: int
    overlap: bool
    rope: tuple[float, ...]
    eps: float
    name: str = "compressor"


@dataclass(frozen=True)
class RowIndex:
    """The `topk` rows that a token sees are those that `heads` of `dim` score highest; the weights
    of their keys' compression are called `<name>.ape` and `<name>.norm.weight`.
    """

    heads: int
    dim: int
    topk: int
    name: str = "indexer.compressor"


class CompressedAttention(Block):
    """q [T, heads * head_dim] and kv [T, head_dim], turned, kv key and value of all heads, with
    `sinks` [heads] beside the block: the last `window` positions, and with a `compression` of
    rows_kv and rows_gate [T, head_dim] (twice that where windows overlap) the rows of those that
    have ended. With an `index` of index_kv, index_gate, index_q [T, heads * dim] and index_weights
    [T, heads] those of them that score highest, ties to the earlier. Values of heads are still
    turned: [T, heads * head_dim].
    """

    kind = "compressed_attention"

    def __init__(
        self,
        heads: int,
        head_dim: int,
        window: int,
        scale: float,
        *,
        sinks: str,
        compression: Compression | None = None,
        index: RowIndex | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.window, self.scale = heads, head_dim, window, scale
        self.sinks_name, self.compression, self.index = sinks, compression, index
        self.width = heads * head_dim
        self.sinks = parameter(heads)
        if compression is not None:
            times = 1 + compression.overlap
            self.ape = parameter(compression.ratio, times * head_dim)
            self.gamma = parameter(head_dim)
            if index is not None:
                self.index_ape = parameter(compression.ratio, times * index.dim)
                self.index_gamma = parameter(index.dim)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        found = [WeightSpec("sinks", sibling(path, self.sinks_name), (self.heads,))]
        if self.compression is not None:
            names = {"": self.compression.name}
            if self.index is not None:
                names["index_"] = self.index.name
            for stem, name in names.items():
                for role, end in (("ape", "ape"), ("gamma", "norm.weight")):
                    shape = tuple(getattr(self, stem + role).shape)
                    found.append(WeightSpec(stem + role, sibling(path, f"{name}.{end}"), shape))
        return tuple(found)

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        found = dict(super().attributes())
        if (rows := self.compression) is not None:
            found |= {"ratio": rows.ratio, "overlap": int(rows.overlap), "rope": rows.rope}
            found |= {"rope_dim": 2 * len(rows.rope), "eps": rows.eps}
        if (index := self.index) is not None:
            found |= {"index_heads": index.heads, "index_dim": index.dim, "index_topk": index.topk}
        return attrs(**found)

    def forward(self, q: Tensor, kv: Tensor, *more: Tensor) -> Tensor:
        about, place = dict(self.attributes()), torch.arange(len(q))
        names = ("rows_kv", "rows_gate", "index_kv", "index_gate", "index_q", "index_weights")
        given = dict(zip(names, more, strict=False))
        rows = seen = None
        if self.compression is not None:
            rows = self._rows(about, given, "rows", "", self.head_dim)
            seen = seen_rows(place, len(rows), self.compression.ratio)
            if self.index is not None:
                own = self._rows(about, given, "index", "index_", self.index.dim)
                queries = given["index_q"], given["index_weights"]
                seen = best_rows(*queries, own, seen, self.index.topk)
        first = torch.tensor(0)
        return attend(q, kv, first, place, rows, seen, self.sinks, self.window, self.scale)

    def _rows(
        self, about: Attrs, given: Mapping[str, Tensor], name: str, stem: str, width: int
    ) -> Tensor:
        """All rows of a sequence that begins here."""
        open_ = torch.zeros(fields(about), width)
        kv, gate = (given[f"{name}_{end}"] for end in ("kv", "gate"))
        weights = [getattr(self, stem + role) for role in ("ape", "gamma")]
        means, _ = pooled(about, open_, kv, gate, weights[0], 0)
        assert self.compression is not None
        return finished(about, means, weights[1], 0, torch.tensor(self.compression.rope))


def attend(
    q: Tensor,
    keys: Tensor,
    first: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    seen: Tensor | None,
    sinks: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """Attention of q [T, heads * dim] at `positions` [T] over keys [K, dim] of the positions from
    `first` on, as far as their window reaches, and over those of `rows` [R, dim] that are `seen`
    [T, R]: [T, heads * dim].
    """
    place = first + torch.arange(len(keys), device=q.device)
    ahead = positions[:, None] - place
    open_ = (ahead >= 0) & (ahead < window)
    if rows is not None and seen is not None:
        keys, open_ = torch.cat((keys, rows)), torch.cat((open_, seen), 1)
    queries = q.reshape(len(q), len(sinks), -1)
    scores = torch.einsum("thd,sd->hts", queries, keys) * scale
    scores = scores.masked_fill(~open_, -torch.inf)
    beside = sinks[:, None, None].expand(-1, len(q), 1)
    weights = torch.cat((scores, beside), -1).softmax(-1)[..., :-1]
    return torch.einsum("hts,sd->thd", weights, keys).flatten(-2)


def seen_rows(positions: Tensor, rows: int, ratio: int) -> Tensor:
    """Which rows tokens see: those of windows that have ended, bool [T, rows]."""
    return torch.arange(rows, device=positions.device) < (positions[:, None] + 1) // ratio


def best_rows(q: Tensor, weights: Tensor, rows: Tensor, seen: Tensor, most: int) -> Tensor:
    """Of the rows [R, dim] that are `seen` [T, R] the `most` that queries [T, heads * dim], weighed
    by head [T, heads], score highest, ties to the earlier.
    """
    if not len(rows):
        return seen
    queries = q.reshape(len(q), weights.shape[-1], -1)
    scores = index_scores(queries, rows, weights).masked_fill(~seen, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return seen & torch.zeros_like(seen).scatter_(-1, order[:, :most], True)


def pooled(
    attrs: Attrs, state: Tensor, kv: Tensor, gate: Tensor, ape: Tensor, position: int
) -> tuple[Tensor, Tensor]:
    """Means [windows that end, width] of tokens from `position` on, kv and gate [T, width], twice
    that where windows overlap; and the state of the window that is open then. A state [fields,
    width] is the running softmaxes that the kernels keep: of the window's row; with overlap also of
    what goes into the row after, and of what went there from the window before.
    """
    ratio, width, overlap = int(attrs["ratio"]), state.shape[1], int(attrs["overlap"])
    before = position % ratio
    gate = gate + ape[(position + torch.arange(len(gate), device=gate.device)) % ratio]
    own = _windows(state[:3], kv[:, overlap * width :], gate[:, overlap * width :], before, ratio)
    ended = (before + len(kv)) // ratio
    after = [own[:, ended] if own.shape[1] > ended else state[:3]]
    found = own[:, :ended]
    if overlap:
        ahead = _windows(state[3:6], kv[:, :width], gate[:, :width], before, ratio)
        past = torch.cat((state[6:, None], ahead[:, :ended]), 1)
        after += [ahead[:, ended] if ahead.shape[1] > ended else state[3:6], past[:, -1]]
        other = past[:, :ended].clone()
        if position < ratio:
            other[0, :1], other[1:, :1] = -torch.inf, 0.0
        found = _merged(other, found)
    return found[2] / found[1], torch.cat(after)


def _windows(state: Tensor, kv: Tensor, gate: Tensor, before: int, ratio: int) -> Tensor:
    """(maximum, sum, weighted sum) [3, windows, width] of tokens, `before` of whose first window
    are in `state` [3, width]; the last may be open.
    """
    tokens, width = kv.shape
    count = -(-(before + tokens) // ratio)
    values = kv.new_zeros(count * ratio, width)
    gates = torch.full_like(values, -torch.inf)
    values[before : before + tokens], gates[before : before + tokens] = kv, gate
    gates, values = (each.reshape(count, ratio, width) for each in (gates, values))
    top = gates.amax(1)
    raised = torch.exp(gates - top[:, None])
    found = torch.stack((top, raised.sum(1), (raised * values).sum(1)))
    if before:
        found[:, :1] = _merged(state[:, None], found[:, :1])
    return found


def _merged(one: Tensor, other: Tensor) -> Tensor:
    """Two softmaxes of the same columns together, [3, ...]."""
    top = torch.maximum(one[0], other[0])
    first, second = torch.exp(one[0] - top), torch.exp(other[0] - top)
    return torch.stack((top, *(one[n] * first + other[n] * second for n in (1, 2))))


def finished(attrs: Attrs, means: Tensor, gamma: Tensor, number: int, rope: Tensor) -> Tensor:
    """Rows [R, width], the first of which is row `number`, of their means: normed, and their last
    elements turned by the angles of their first tokens' positions.
    """
    normed = means * (means.square().mean(-1, keepdim=True) + float(attrs["eps"])).rsqrt() * gamma
    place = (number + torch.arange(len(means), device=means.device)) * int(attrs["ratio"])
    angle = place.float()[:, None] * rope
    cos, sin = angle.cos(), angle.sin()
    start = normed.shape[1] - 2 * len(rope)
    kept, part = normed[:, :start], normed[:, start:]
    a, b = part[:, 0::2], part[:, 1::2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((kept, turned), -1)
