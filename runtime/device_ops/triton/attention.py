"""Attention on a GPU by hmc's Triton kernels: tensors in, tensors out; hides tiles, grids and
splits.

Everything is handed to the current stream; nothing waits and no value is read. Tensors of rows may
be views of some columns: their last dimension is dense. What q is rounded to is bf16, sums are f32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hmc.codegen.triton import attend_tiles, library
from hmc.codegen.triton.attend_tiles import Head
from hmc.ops.attention import NO_BOUNDS, Bounds, Growth
from hmc.runtime.device_ops.triton.launch import Weight, Workspace, arch, processors


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    y: torch.Tensor,
    work: Workspace,
    *,
    kv_heads: int,
    head_dim: int,
    v_dim: int,
    scale: float,
    block: int = 1,
    bounds: Bounds = NO_BOUNDS,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    growth: Growth = None,
) -> None:
    """y bf16 [T, heads * v_dim] of q [T, heads * head_dim], one query a sequence, over keys and
    values bf16 [cache rows, kv_heads * head_dim or v_dim].

    `tables` i32 or i64 [T, blocks] are the cache's blocks of each sequence in order (with blocks of
    one row: its rows), padded with any; `lengths` i64 [T] the positions it sees. `values` None: the
    first v_dim columns of keys. With `sinks` [heads] one more key of this score, whose value is 0.
    `bounds` and `growth` as of hmc/ops/attention.py. A launch replayed with other tables and
    lengths is right as long as tables have room.
    """
    tokens, heads = len(q), q.shape[1] // head_dim
    head, group = Head(head_dim, v_dim, values is None), heads // kv_heads
    tile = attend_tiles.few(head, group, arch(q.device))
    tiles = kv_heads * -(-group // tile.rows)
    longest, part = tables.shape[1] * block, tile.rows * (head.wide + 2)
    splits = attend_tiles.splits(
        tokens * tiles, longest, processors(q.device), part, len(work.partials)
    )
    assert splits == 1 or tokens * tiles <= len(work.counters)
    values = keys if values is None else values
    library.kernels().attend[tiles, tokens, splits](
        q, keys, values, tables, lengths, lengths if sinks is None else sinks, y, work.partials,
        work.counters, scale, growth[0] if growth else 0.0, q.stride(0), keys.stride(0),
        values.stride(0), y.stride(0), tables.stride(0), splits, GROUP=group, SOFTCAP=softcap,
        SINKS=sinks is not None, SHARED=head.shared, BLOCK=block, HEADS=tile.rows, KEYS=tile.keys,
        SPLITS=attend_tiles.MOST_SPLITS, UNROLL=attend_tiles.unrolled(tile, head),
        **_constants(bounds, growth), **head.constants, **tile.options,
    )  # fmt: skip


def prompt(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    y: torch.Tensor,
    *,
    scale: float,
    turned: torch.Tensor | None = None,
    bounds: Bounds = NO_BOUNDS,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    growth: Growth = None,
    before: int = 0,
) -> None:
    """y bf16 [T, heads * v_dim] of q [T, heads * head_dim], the last T positions of keys and values
    bf16 [S, kv_heads, head_dim or v_dim], none seeing later ones. The last columns of all heads'
    keys are `turned` [S, columns], where there are such. Of the positions the first is `before`,
    where with chunks one begins. Options as of `attend`."""
    tokens, (total, kv_heads, columns) = len(q), keys.shape
    apart = 0 if turned is None else turned.shape[1]
    head = Head(columns + apart, values.shape[2], apart=apart)
    heads = q.shape[1] // head.head_dim
    rests = keys[..., head.cut :] if turned is None else turned[:, None]
    tile = attend_tiles.many(head, arch(q.device), not bounds.reach and not softcap)
    library.kernels().attend_prompt[-(-tokens // tile.rows), heads](
        q, keys, rests, values, q if sinks is None else sinks, y, scale,
        growth[0] if growth else 0.0, tokens, total - tokens, before, q.stride(0), keys.stride(0),
        rests.stride(0), values.stride(0), y.stride(0), GROUP=heads // kv_heads, SOFTCAP=softcap,
        SINKS=sinks is not None, K_HEAD=keys.stride(1), R_HEAD=0 if apart else rests.stride(1),
        V_HEAD=values.stride(1), QUERIES=tile.rows, KEYS=tile.keys, **_constants(bounds, growth),
        **head.constants, **tile.options,
    )  # fmt: skip


def _constants(bounds: Bounds, growth: Growth) -> dict[str, int]:
    """As kernels take them."""
    _, every, ahead = growth or (0.0, 0, 0)
    return {"WINDOW": bounds.window, "CHUNK": bounds.chunk, "EVERY": every, "AHEAD": ahead}


OverLatents = Callable[[torch.Tensor, torch.Tensor], None]
"""Fills its second tensor bf16 [T, heads * rank], latents mixed by queries bf16 [T, heads * (rank +
rope)]."""


def latent(
    q: torch.Tensor,
    kv_b: Weight,
    y: torch.Tensor,
    attends: OverLatents,
    *,
    heads: int,
    nope: int,
    rope: int,
    v_dim: int,
) -> None:
    """y bf16 [T, heads * v_dim] of q [T, heads * (nope + rope)], one query a sequence; what
    `attends` works on latents alone, and kv_b [heads * (nope + v_dim), rank] multiplies query and
    result. Between the launches lie bf16 tensors of T * heads * (2 rank + rope).
    """
    tokens, rank = len(q), kv_b.columns
    wide = torch.empty((tokens, heads * (rank + rope)), dtype=torch.bfloat16, device=q.device)
    mixed = torch.empty((tokens, heads * rank), dtype=torch.bfloat16, device=q.device)
    kernels = library.latent_kernels(kv_b.layout)
    sizes: dict[str, Any] = {"NOPE": nope, "V_DIM": v_dim, "RANK": rank, "HEADS": heads}
    tile = attend_tiles.absorbed(kv_b.layout.step, nope)
    grid = -(-rank // tile.depth), heads, -(-tokens // tile.tokens)
    kernels.absorb[grid](
        q, kv_b.planes, wide, tokens, q.stride(0), kv_b.stride, ROPE=rope,
        TURNED=attend_tiles.power(rope), **sizes, **tile.constants, **tile.options,
    )  # fmt: skip
    attends(wide, mixed)
    tile = attend_tiles.lifted(kv_b.layout.step, v_dim)
    grid = -(-v_dim // tile.rows), heads, -(-tokens // tile.tokens)
    kernels.lift[grid](
        mixed, kv_b.planes, y, tokens, y.stride(0), kv_b.stride, **sizes, **tile.constants,
        **tile.options,
    )  # fmt: skip


def over_latents(
    q: torch.Tensor,
    y: torch.Tensor,
    *,
    cache: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    work: Workspace,
    rank: int,
    scale: float,
    block: int = 1,
    growth: Growth = None,
) -> None:
    """As `attend`, of latents bf16 [cache rows, rank + rope], which are keys and values."""
    attend(
        q, cache, None, tables, lengths, y, work,
        kv_heads=1, head_dim=cache.shape[1], v_dim=rank, scale=scale, block=block, growth=growth,
    )  # fmt: skip


def append(
    news: tuple[torch.Tensor, ...], caches: tuple[torch.Tensor, ...], slots: torch.Tensor
) -> None:
    """Rows `slots` i64 [T] of each of `caches` bf16 become those of `news`, f32 or bf16 [T, width];
    of a cache side by side, `caches` are its columns."""
    widths = tuple(each.shape[1] for each in news)
    columns = min(1024, attend_tiles.power(max(widths)))
    library.kernels().append[len(slots), -(-max(widths) // columns)](
        news, caches, slots, tuple(each.stride(0) for each in news),
        tuple(each.stride(0) for each in caches), WIDTHS=widths, COLUMNS=columns,
    )  # fmt: skip
