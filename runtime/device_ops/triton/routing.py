"""Routing and sorting on a GPU by hmc's Triton kernels.

Everything is handed to the current stream; nothing waits and no value is read.
"""

from __future__ import annotations

import torch

from hmc.codegen.triton import library
from hmc.codegen.triton.attend_tiles import power
from hmc.ops.routing import Routing
from hmc.runtime.device_ops.triton.launch import Workspace

FEW = 1 << 12
"""Most slots that are sorted by one launch: each looks at all."""


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    ids: torch.Tensor,
    routing: torch.Tensor,
    about: Routing,
) -> None:
    """ids i32 and routing f32 [T, top_k], contiguous, of logits [T, experts], as
    `device_ops.moe.routed` makes them, times the factor and the experts' scales. `bias` and `scale`
    are f32 or bf16 [experts]."""
    tokens, experts = logits.shape
    top_k = ids.shape[1]
    number = about.groups if about.top_groups else 1
    size = experts // number
    high, wide = power(number), power(size)
    library.kernels().route[tokens,](
        logits, logits if bias is None else bias, logits if scale is None else scale, ids, routing,
        experts, about.factor, about.eps, about.jitter, logits.stride(0), TOP_K=top_k,
        SCORING=about.scoring, NORMALISE=about.normalise, BIAS=bias is not None,
        SCALED=scale is not None, GROUPS=number, SIZE=size, KEPT=about.top_groups,
        BEST=about.group_best, HIGH=high, WIDE=wide, CHOSEN=power(top_k), num_warps=1,
    )  # fmt: skip


def by_expert(ids: torch.Tensor, order: torch.Tensor, edges: torch.Tensor, work: Workspace) -> None:
    """order [slots] = slots of contiguous ids i32 (any shape) by expert, ascending within each,
    those of negative ids first, which belong to none; edges [experts + 1] are where each expert's
    begin. Both are i32 or i64.
    """
    slots, experts = ids.numel(), len(edges) - 1
    kernels = library.kernels()
    if slots <= FEW:
        own = 32
        grid = -(-slots // own) + -(-len(edges) // own)
        kernels.sorted_few[grid,](ids, order, edges, slots, experts, OWN=own, MANY=256, EXPERTS=own)
        return
    own, bins = 128, experts + 1
    chunks = -(-slots // own)
    counts = torch.empty((chunks + 1, bins), dtype=torch.int32, device=ids.device)
    kernels.histogram[chunks, -(-bins // 64)](ids, counts, slots, bins, OWN=own, BINS=64)
    kernels.scanned[-(-bins // 16),](
        counts, counts[chunks], edges, work.counters, chunks, bins, experts, MANY=256, BINS=16,
        ALL=power(bins),
    )  # fmt: skip
    kernels.placed[chunks,](ids, order, counts, edges, slots, bins, OWN=own)
