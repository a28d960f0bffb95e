"""An indexer that chooses pools of positions on a device, by the functions of its reference
(hmc/blocks/pools.py): one sequence of the call after the other, on the home GPU's states.
"""

from __future__ import annotations

import torch

from hmc.blocks.compressed import pooled
from hmc.blocks.pools import chosen, of_pools
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.compressed import Part, parts_of
from hmc.runtime.device_ops.context import CACHED, KIND
from hmc.runtime.device_ops.shares import Call


def index_pools(bound: Bound, step: Step) -> Work:
    """Keys of pools that end, then the positions that each token attends to."""
    names = ("q", "k", "gate", "weights")
    q, k, gate, weights = (bound.tensor(step.inputs[name]) for name in names)
    found, share = bound.tensor(step.outputs["chosen"]), bound.share(step)
    heads, dim, most, pool = ints(step, "heads", "dim", "index_topk", "pool")
    device, stored = bound.device(step), bound.vector(step, "ape")
    assert stored is not None
    ape = stored.to(KIND).view(pool, dim)
    keys, open_ = (bound.cache(step.layer, name) for name in ("pools", "pools_open"))

    def one(part: Part) -> None:
        state = open_[part.slot].view(-1, dim)
        new = k[part.rows].to(KIND), gate[part.rows].to(KIND)
        means, after = pooled(of_pools(pool), state, *new, ape, part.position)
        state.copy_(after)
        ends = part.places[pool - 1 :: pool] // pool
        rows = keys.view(-1, dim)
        rows.index_copy_(0, ends[len(ends) - len(means) :], means.to(CACHED))
        seen = rows[ends].to(KIND)
        of_token = KIND.itemsize * (2 * heads * len(seen) + heads * dim) + 20 * len(seen)
        for some in scratch.blocks(part.rows.start, part.rows.stop, of_token):
            at = part.position + some.start - part.rows.start
            positions = torch.arange(at, at + some.stop - some.start, device=q.device)
            queries = q[some].to(CACHED).to(KIND).view(-1, heads, dim)  # as the host's kernels do
            found[some] = chosen(queries, seen, weights[some].to(KIND), positions, most, pool)

    def work(call: Call) -> None:
        for part in parts_of(call, share, device):
            one(part)

    return work
