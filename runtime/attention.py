"""Latent attention of a prompt chunk over the paged cache, by PyTorch, in bounded memory; hides
gathering, masks, MLA's two forms.

The chunk's own rows are read from the cache, where an append kernel has put them, so a chunk sees
what decode will see. Queries are taken a few hundred at a time and heads a few at a time, such that
masks and gathered rows stay within `_BYTES` each, whatever the context.

All products are in f32: the result's bf16 rounding stays the only loss beside the cache's own, as
in decode.

PyTorch's flash kernel needs queries, keys and values of one width and gives no log-sum-exp to
merge; so a chunk behind a past carries an explicit mask, and values narrower than keys are padded
with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

_BYTES = 64 << 20

Rows = Callable[[int, int], torch.Tensor]
"""Rows [first, last) of a weight as f32."""


@dataclass(frozen=True)
class Past:
    """Where a chunk of `tokens` queries stands: it follows `past` tokens; `blocks` i64 [n] hold
    them all.
    """

    blocks: torch.Tensor
    past: int
    tokens: int

    @property
    def total(self) -> int:
        """Positions the last query sees."""
        return self.past + self.tokens


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention: q [T, heads * (nope + rope)], cache rows [rank + rope],
    y [T, heads * v_dim].
    """

    heads: int
    nope: int
    rope: int
    v_dim: int
    rank: int
    scale: float


def latent(
    q: torch.Tensor,
    cache: torch.Tensor,
    kv_b: Rows,
    past: Past,
    y: torch.Tensor,
    sizes: Latent,
) -> None:
    """y bf16 [T, heads * v_dim] = latent attention of q f32 [T, heads * (nope + rope)], rope parts
    rotated.

    `cache` bf16 [blocks, 1, block, rank + rope]; `kv_b` gives rows of [heads * (nope + v_dim),
    rank] as f32. Of two equal forms the one with fewer multiplications is taken: keys and values
    expanded from the latents (long chunks), or the expansion absorbed into query and result (few
    queries, long past).
    """
    s = sizes
    tokens = len(q)
    rows = _rows(cache.transpose(0, 1), past)[0]
    queries = q.view(tokens, s.heads, s.nope + s.rope).transpose(0, 1)
    result = y.view(tokens, s.heads, s.v_dim).transpose(0, 1)
    expand = past.total * s.rank * (s.nope + s.v_dim) + 2 * tokens * past.total * (s.nope + s.rope)
    absorb = tokens * s.rank * (s.nope + s.v_dim) + 2 * tokens * past.total * (s.rank + s.rope)
    form = _expanded if expand <= absorb else _absorbed
    step = max(1, _BYTES // (4 * past.total * (s.nope + s.rope)))
    per_head = s.nope + s.v_dim
    for first in range(0, s.heads, step):
        heads = slice(first, min(first + step, s.heads))
        weight = kv_b(heads.start * per_head, heads.stop * per_head).view(-1, per_head, s.rank)
        result[heads] = form(queries[heads], rows, weight, past, s)


def _expanded(
    q: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, past: Past, s: Latent
) -> torch.Tensor:
    """Results [heads, T, v_dim] with keys and values of every head made from the latents."""
    heads, total = len(q), len(rows)
    wide = max(s.nope + s.rope, s.v_dim)
    compressed = rows[:, : s.rank]
    keys = rows.new_zeros(heads, total, wide)
    keys[..., : s.nope] = compressed @ weight[:, : s.nope].transpose(1, 2)
    keys[..., s.nope : s.nope + s.rope] = rows[:, s.rank :]
    values = rows.new_zeros(heads, total, wide)
    values[..., : s.v_dim] = compressed @ weight[:, s.nope :].transpose(1, 2)
    return _attend(q[:, None], keys, values, past, s.scale)[:, 0, :, : s.v_dim]


def _absorbed(
    q: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, past: Past, s: Latent
) -> torch.Tensor:
    """The same with queries taken into the latent space: all heads share one key row, which is the
    value row too.
    """
    inner = q[..., : s.nope] @ weight[:, : s.nope]
    queries = torch.cat((inner, q[..., s.nope :]), -1)
    shared = rows[None]
    found = _attend(queries[None], shared, shared, past, s.scale)[0, ..., : s.rank]
    return found @ weight[:, s.nope :].transpose(1, 2)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, past: Past, scale: float
) -> torch.Tensor:
    """Attention [G, H, T, v] of q [G, H, T, d] over keys, values [G, S, d], [G, S, v]; a group's
    heads share its rows.
    """
    groups, heads, tokens, width = q.shape
    v_dim = values.shape[-1]
    wide = max(width, v_dim, keys.shape[-1])
    q, keys, values = (_padded(part, wide) for part in (q, keys, values))
    result = q.new_empty(groups, heads, tokens, v_dim)
    plain = past.past == 0
    step = tokens if plain else max(1, _BYTES // (4 * past.total))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        for first in range(0, tokens, step):
            last = min(first + step, tokens)
            high = past.past + last
            mask = None if plain else _mask(past.past + first, last - first, high)
            shape = (groups, heads, high, wide)
            part = scaled_dot_product_attention(
                q[:, :, first:last],
                keys[:, None, :high].expand(shape),
                values[:, None, :high].expand(shape),
                attn_mask=mask,
                is_causal=plain,
                scale=scale,
            )
            result[:, :, first:last] = part[..., :v_dim]
    return result


def _mask(position: int, tokens: int, high: int) -> torch.Tensor:
    """What is added to scores of queries at `position` on against keys 0..high: 0 or -inf."""
    query = torch.arange(position, position + tokens)[:, None]
    hidden = torch.arange(high)[None] > query
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _padded(part: torch.Tensor, wide: int) -> torch.Tensor:
    missing = wide - part.shape[-1]
    return torch.nn.functional.pad(part, (0, missing)) if missing else part


def _rows(cache: torch.Tensor, past: Past) -> torch.Tensor:
    """Rows f32 [heads, total, dim] of a cache bf16 [heads, blocks, block, dim]; a copy."""
    heads, _, block, dim = cache.shape
    blocks = past.blocks[: -(-past.total // block)]
    found = cache[:, blocks].to(torch.float32)
    return found.view(heads, len(blocks) * block, dim)[:, : past.total]
