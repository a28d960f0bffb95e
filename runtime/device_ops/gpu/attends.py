"""Steps of attention on a GPU, by Triton kernels: over this call's tokens and the cached past.

New rows are put into the home GPU's cache first, in bf16, and read from there; by other GPUs of a
call from the buffers, rounded likewise. What some heads of latent attention lift from the whole
context keeps to `scratch.BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Any

import torch
from torch import Tensor

from hmc.ops.attention import Bounds, grows
from hmc.ops.row import FEW
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.context import first_of, seen_rows
from hmc.runtime.device_ops.gpu.dense import in_eights, weight_of
from hmc.runtime.device_ops.shares import Call, Rows
from hmc.runtime.device_ops.triton import attention as kernels
from hmc.runtime.device_ops.triton import launch
from hmc.runtime.device_ops.triton.launch import Terms, Weight, Workspace, X


def attention(bound: Bound, step: Step) -> Work:
    """Grouped-query attention: query head h reads key head h // (heads / kv_heads)."""
    q, k, v = (bound.tensor(step.inputs[role]) for role in ("q", "k", "v"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    kv_heads, head_dim = ints(step, "kv_heads", "head_dim")
    home, space = bound.home(device), bound.workspace(step)
    caches = tuple(bound.cache(step.layer, name) for name in ("k", "v")) if home else ()
    v_dim = v.shape[1] // kv_heads
    bounds, sinks = Bounds.of(step.attrs), bound.vector(step, "sinks")
    how: dict[str, Any] = {
        "scale": float(step.attrs["scale"]), "bounds": bounds, "sinks": sinks,
        "softcap": float(step.attrs.get("softcap", 0.0)), "growth": grows(step.attrs),
    }  # fmt: skip

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        append(call, rows, (k, v), caches)
        table = table_of(call, rows)
        if table is not None and caches:
            (keys, values), (reach, lengths) = caches, table
            part = slice(0, rows.count)
            kernels.attend(
                q[part], keys, values, reach, lengths, y[part], space,
                kv_heads=kv_heads, head_dim=head_dim, v_dim=v_dim, **how,
            )  # fmt: skip
            return
        start = first_of(rows, bounds)
        keys, values = (
            seen_rows(
                bound, step, call, name, slice(0, new.shape[1]), (new,), torch.bfloat16, start
            ).view(-1, kv_heads, new.shape[1] // kv_heads)
            for name, new in (("k", k), ("v", v))
        )
        for span in rows.spans:
            part, high = slice(span.first, span.last), span.position + span.last - span.first
            low = max(0, bounds.first(span.position))
            seen = slice(low - start, high - start)
            kernels.prompt(q[part], keys[seen], values[seen], y[part], before=low, **how)

    return work


def mla(bound: Bound, step: Step) -> Work:
    """Latent attention: kv_b absorbed into query and result for one query a sequence, keys and
    values lifted from the latents for more.
    """
    q, latent, k_rope = (bound.tensor(step.inputs[role]) for role in ("q", "latent", "k_rope"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    heads, nope, rope, v_dim, rank = ints(step, "heads", "nope", "rope", "v_dim", "rank")
    kv_b, scale = weight_of(bound.matrix(step, "kv_b")), float(step.attrs["scale"])
    growth = grows(step.attrs)
    home, space = bound.home(device), bound.workspace(step)
    cache = bound.cache(step.layer, "latent") if home else None
    caches = () if cache is None else (cache[:, :rank], cache[:, rank:])
    lifted = _Lifted(kv_b, heads, nope + v_dim, in_eights(kv_b, q.device))

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        append(call, rows, (latent, k_rope), caches)
        table = table_of(call, rows)
        if table is not None and cache is not None:
            attends = partial(
                kernels.over_latents, cache=cache, tables=table[0], lengths=table[1], work=space,
                rank=rank, scale=scale, growth=growth,
            )  # fmt: skip
            kernels.latent(
                q[: rows.count], kv_b, y[: rows.count], attends,
                heads=heads, nope=nope, rope=rope, v_dim=v_dim,
            )  # fmt: skip
            return
        latents, turned = (
            seen_rows(bound, step, call, "latent", columns, (new,), torch.bfloat16)
            for columns, new in ((slice(0, rank), latent), (slice(rank, rank + rope), k_rope))
        )
        taken = lifted.taken(latents)
        for some in lifted.blocks(len(turned)):
            both = lifted.of(some, taken, space)
            keys, values = both[..., :nope], both[..., nope:]
            mine = q[:, some.start * (nope + rope) : some.stop * (nope + rope)]
            result = y[:, some.start * v_dim : some.stop * v_dim]
            for span in rows.spans:
                part, high = slice(span.first, span.last), span.position + span.last - span.first
                kernels.prompt(
                    mine[part], keys[:high], values[:high], result[part],
                    turned=turned[:high], scale=scale, growth=growth,
                )  # fmt: skip

    return work


@dataclass(frozen=True)
class _Lifted:
    """Keys and values of some heads side by side, bf16 [S, h, per_head], of latents [S, rank]."""

    kv_b: Weight
    heads: int
    per_head: int
    eights: bool

    def blocks(self, total: int) -> Iterator[slice]:
        """Some heads: as many as bytes allow, those whose rows share scales together."""
        least = lcm(self.per_head, self.kv_b.whole_rows) // self.per_head
        of_least = 2 * total * least * self.per_head
        for some in scratch.blocks(0, -(-self.heads // least), of_least, scratch.BYTES // 2):
            yield slice(some.start * least, min(some.stop * least, self.heads))

    def taken(self, latents: Tensor) -> X:
        """Latents as they are multiplied, for all heads."""
        several = self.eights and len(latents) > FEW
        return Terms.of(latents, self.kv_b.layout) if several else latents

    def of(self, some: slice, latents: X, space: Workspace) -> Tensor:
        """Of heads `some`."""
        part = self.kv_b.part(some.start * self.per_head, some.stop * self.per_head)
        found = torch.empty((len(latents), part.rows), dtype=torch.bfloat16, device=latents.device)
        launch.matmul(latents, part, space, out=found)
        return found.view(len(latents), -1, self.per_head)


def append(call: Call, rows: Rows, new: tuple[Tensor, ...], caches: tuple[Tensor, ...]) -> None:
    """Put new rows into the home GPU's caches (none elsewhere): those of the whole call where it is
    one sequence's, else those of the share."""
    if caches:
        single = rows.reach is None
        count, slots = (call.tokens, call.slots) if single else (rows.count, rows.slots)
        kernels.append(tuple(each[:count] for each in new), caches, slots)


def table_of(call: Call, rows: Rows) -> tuple[Tensor, Tensor] | None:
    """The cache rows that each query sees, and how many, where each is a sequence's only one."""
    if rows.reach is not None and rows.lengths is not None:
        return rows.reach, rows.lengths
    if call.tokens > 1:
        return None
    return torch.cat((call.past_slots, call.slots))[None], rows.positions + 1
