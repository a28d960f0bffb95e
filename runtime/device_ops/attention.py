"""Grouped-query attention on a device over this call's tokens and the cached past, in bounded
memory.

A call of many sequences, one token each, reads the cache padded to the longest, or to what its
graph has room for. This is what the CPU does where it plays a GPU: products are f32. (On GPUs they
are hmc's Triton kernels: runtime/device_ops/triton.)

What some heads read of the whole context takes a quarter of `scratch.BYTES`, what some rows or
sequences make of it another; but one head, one row and one sequence is the least.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from hmc.ops.attention import Bounds, grows
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.context import (
    HIDDEN,
    KIND,
    SCORE,
    append,
    batches,
    chunks,
    first_of,
    grown,
    later,
    reached,
    seen_rows,
)
from hmc.runtime.device_ops.shares import Call, Rows


@dataclass(frozen=True)
class Scores:
    """What becomes of scores: `sinks` [kv_heads, group] are one more a head, whose value is 0."""

    scale: float
    bounds: Bounds
    softcap: float
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether PyTorch's kernels compute them."""
        return not self.softcap and self.sinks is None

    def weights(self, products: Tensor, mask: Tensor) -> Tensor:
        """Softmax of products [..., kv_heads, group, rows, S], which are overwritten, with `mask`
        added to scores."""
        scores = products.mul_(self.scale)
        if self.softcap:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        sinks = None if self.sinks is None else self.sinks[..., None, None]
        return softmax(scores.add_(mask), sinks)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis of scores, which are overwritten; beside them one more of each,
    `sinks` [..., 1], whose weight is left out.
    """
    if sinks is None:
        return scores.softmax(-1)
    top = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    weights = scores.sub_(top).exp_()
    return weights.div_(weights.sum(-1, keepdim=True) + (sinks - top).exp_())


def attention(bound: Bound, step: Step) -> Work:
    """Grouped-query attention: query head h reads key head h // (heads / kv_heads)."""
    q, k, v = (bound.tensor(step.inputs[role]) for role in ("q", "k", "v"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    heads, kv_heads, head_dim = ints(step, "heads", "kv_heads", "head_dim")
    bounds, growth, stored = Bounds.of(step.attrs), grows(step.attrs), bound.vector(step, "sinks")
    group, v_dim = heads // kv_heads, v.shape[1] // kv_heads
    queries = q.view(len(q), kv_heads, group, head_dim)
    scale, home = float(step.attrs["scale"]), bound.home(device)
    softcap = float(step.attrs.get("softcap", 0.0))
    caches = [bound.cache(step.layer, name) for name in ("k", "v")] if home else []
    kind = KIND
    of_row = group * kind.itemsize * (head_dim + 2 * max(head_dim, v_dim))  # q and y, y in order
    of_score = 0 if stored is None and not softcap else group * SCORE
    padded = head_dim if v_dim < head_dim else 0  # by attend
    of_place = (head_dim + v_dim + padded) * kind.itemsize

    def scores_of(some: slice) -> Scores:
        sinks = None if stored is None else stored.view(kv_heads, group)[some].to(torch.float32)
        return Scores(scale, bounds, softcap, sinks)

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        append(call, rows, ((k,), (v,)), caches)
        longest = call.past + call.tokens if rows.reach is None else rows.reach.shape[1]
        for some in scratch.blocks(0, kv_heads, longest * of_place, scratch.quarter()):
            result = y[:, some.start * group * v_dim : some.stop * group * v_dim]
            (one if rows.reach is None else many)(call, rows, some, result)

    def mine(rows: Rows, some: slice, part: slice) -> Tensor:
        """Queries [n, some heads, group, head_dim]."""
        return grown(queries[part, some].to(kind), rows.positions[part], growth)

    def columns(some: slice) -> list[slice]:
        return [slice(some.start * width, some.stop * width) for width in (head_dim, v_dim)]

    def one(call: Call, rows: Rows, some: slice, result: Tensor) -> None:
        number, how = some.stop - some.start, scores_of(some)
        start = first_of(rows, bounds)
        keys, values = (
            seen_rows(bound, step, call, name, part, (new[:, part],), kind, start)
            for name, part, new in zip(("k", "v"), columns(some), (k, v), strict=True)
        )
        keys, values = (each.view(len(each), number, -1) for each in (keys, values))
        for part, high, low in chunks(rows, bounds, number * of_row, number * of_score + HIDDEN):
            seen = slice(low - start, high - start)
            wide = mine(rows, some, part).flatten(1, 2)
            result[part] = attended(how, wide, keys[seen], values[seen])
            del wide

    def many(call: Call, rows: Rows, some: slice, result: Tensor) -> None:
        number, how = some.stop - some.start, scores_of(some)

        def of(part: slice) -> None:
            reach, hidden = reached(rows, part, bounds)
            keys, values = (
                cache[:, part][reach].view(*reach.shape, number, -1).transpose(1, 2).to(kind)
                for cache, part in zip(caches, columns(some), strict=True)
            )
            wide, mask = mine(rows, some, part), hidden[:, None, None].to(kind)
            if how.plain:
                found = scaled_dot_product_attention(
                    wide, keys, values, attn_mask=mask, scale=scale
                )
            else:
                products = (wide @ keys.transpose(-1, -2))[..., None, :]
                found = how.weights(products, mask[..., None, :])[..., 0, :] @ values
            result[part] = found.flatten(1).to(result.dtype)

        of_key = 2 * number * of_place + number * of_score + HIDDEN
        for part in batches(rows, number * of_row, of_key):
            of(part)

    return work


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, bounds: Bounds) -> Tensor:
    """Causal attention [T, heads * v] of q [T, heads, d], the last T of the positions of keys [S,
    kv_heads, d] and values [S, kv_heads, v]. Of `bounds` with chunks, the first key begins one.
    """
    tokens, total, group = len(q), len(keys), q.shape[1] // keys.shape[1]
    v_dim = values.shape[2]
    mask = _lower_right(tokens, total)
    if bounds.reach:
        mask = later(total - tokens, tokens, total, q.device, bounds).to(q.dtype)
    if (missing := q.shape[2] - v_dim) > 0:  # fused kernels want one width
        values = pad(values, (0, missing))
    found = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=group > 1,
    )
    return found[0, ..., :v_dim].transpose(0, 1).flatten(1)


def attended(how: Scores, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `attend`, of any scores."""
    if how.plain:
        return attend(q, keys, values, how.scale, how.bounds)
    tokens, total, kv_heads = len(q), len(keys), keys.shape[1]
    wide = q.view(tokens, kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)
    mask = later(total - tokens, tokens, total, q.device, how.bounds)
    weights = how.weights(wide @ keys.permute(1, 2, 0)[:, None], mask)
    return (weights @ values.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1)


def _lower_right(tokens: int, total: int) -> Tensor:
    """PyTorch's mask that fused kernels know without one being made. Its module loads
    torch._dynamo, more than a second: only who attends on a device shall wait for it."""
    found: Tensor = import_module("torch.nn.attention.bias").causal_lower_right(tokens, total)
    return found
