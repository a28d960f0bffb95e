"""Attention over a window and compressed rows on a device, by the functions of its reference
(hmc/blocks/compressed.py): one sequence of the call after the other, on the home GPU's states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hmc.blocks.compressed import attend, best_rows, finished, pooled, seen_rows
from hmc.ops import op_of
from hmc.ops.compressed import fields, row_tokens
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.context import CACHED
from hmc.runtime.device_ops.shares import Call, Share


@dataclass(frozen=True)
class Part:
    """The tokens of one sequence in a call: which rows of it, the slot and the position of the
    first, and the cache's places of all its positions so far.
    """

    rows: slice
    slot: int
    position: int
    places: Tensor


def compressed_attention(bound: Bound, step: Step) -> Work:
    """Rows of windows first, then compressed rows, then attention over both."""
    attrs, share, device = step.attrs, bound.share(step), bound.device(step)
    inputs = {
        role.name: bound.tensor(step.inputs[role.name])
        for role in op_of(step.op).graph_inputs
        if role.name in step.inputs
    }
    y = bound.tensor(step.outputs["y"])
    kept = {
        state.name: bound.cache(step.layer, state.name) for state in op_of(step.op).states(attrs)
    }
    head_dim, window = ints(step, "head_dim", "window")
    heads, scale = int(attrs["heads"]), float(attrs["scale"])

    def vector(role: str) -> Tensor:
        found = bound.vector(step, role)
        assert found is not None
        return found.to(torch.float32)

    def rows_of(part: Part, name: str, kv: str, stem: str, width: int) -> Tensor:
        """All rows of a sequence, those that its tokens end among them."""
        ratio = int(attrs["ratio"])
        state = kept[f"{name}_open"][part.slot].view(fields(attrs), width)
        values, gate = (inputs[f"{kv}_{end}"][part.rows] for end in ("kv", "gate"))
        ape = vector(f"{stem}ape").view(ratio, -1)
        means, after = pooled(attrs, state, values, gate, ape, part.position)
        state.copy_(after)
        cache = kept[name].view(-1, width)
        ends = part.places[ratio - 1 :: ratio] // row_tokens(ratio)
        if len(means):
            number = len(ends) - len(means)
            rope = torch.tensor(bound.plan.constants[str(attrs["rope"])], device=y.device)
            made = finished(attrs, means, vector(f"{stem}gamma"), number, rope)
            cache.index_copy_(0, ends[number:], made.to(CACHED))
        return cache[ends].to(torch.float32)

    def of_window(part: Part) -> tuple[Tensor, int]:
        """Keys of the window before the part and of its own tokens; the first one's position."""
        held = kept["window"][part.slot].view(window, head_dim)
        new = inputs["kv"][part.rows].to(CACHED)
        first = max(0, part.position - window + 1)
        before = torch.arange(first, part.position, device=y.device) % window
        keys = torch.cat((held[before], new)).to(torch.float32)
        last = new[-window:]
        end = part.position + len(new)
        held.index_copy_(0, torch.arange(end - len(last), end, device=y.device) % window, last)
        return keys, first

    def one(part: Part) -> None:
        keys, first = of_window(part)
        rows = own = None
        if "ratio" in attrs:
            rows = rows_of(part, "rows", "rows", "", head_dim)
        if "index_topk" in attrs:
            own = rows_of(part, "index_rows", "index", "index_", int(attrs["index_dim"]))
        count = 0 if rows is None else len(rows)
        width = window + count + (0 if own is None else int(attrs["index_heads"]) * count)
        row = 4 * (2 * heads * head_dim + 3 * heads * width)
        for some in scratch.blocks(part.rows.start, part.rows.stop, row):
            at = part.position + some.start - part.rows.start
            positions = torch.arange(at, at + some.stop - some.start, device=y.device)
            low = max(0, at - window + 1)
            near = keys[low - first : at + len(positions) - first]
            seen = None
            if rows is not None:
                seen = seen_rows(positions, count, int(attrs["ratio"]))
            if own is not None and seen is not None:
                queries, weights = (inputs[each][some] for each in ("index_q", "index_weights"))
                seen = best_rows(queries, weights, own, seen, int(attrs["index_topk"]))
            start, sinks = torch.tensor(low, device=y.device), vector("sinks")
            q = inputs["q"][some]
            y[some] = attend(q, near, start, positions, rows, seen, sinks, window, scale)

    def work(call: Call) -> None:
        for part in parts_of(call, share, device):
            one(part)

    return work


def parts_of(call: Call, share: Share, device: str) -> Iterator[Part]:
    """The sequences of a call, one after the other."""
    rows = call.rows[share, device]
    if call.single:
        places = torch.cat((call.past_slots, call.slots))
        yield Part(slice(0, rows.count), int(call.tables[0]), call.past, places)
        return
    assert rows.reach is not None
    ((first, last),) = share.pieces(call.tokens)  # of all tokens, or of a lane
    for number, at in enumerate(range(first, last)):
        position = int(call.positions[at])
        places = rows.reach[number, : position + 1]
        yield Part(slice(number, number + 1), int(call.tables[at]), position, places)
