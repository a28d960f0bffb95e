"""Moving rows: between host and devices, between ranks, between lanes, and weights into slots.

Loads are cut into pieces, between which copies of other streams get their turn.
Between ranks of one process rows are copied from device to device, between processes by `Link`;
both compute the same bits. Copies are asynchronous where
the host's memory is pinned. Cache rows come to the host as they are computed; the CPU rounds them
and puts them into pages (`kv_out`). What is rounded, sent or received on the way goes in blocks of
rows that keep to `scratch.BYTES` on each device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hmc.ops import OPS
from hmc.plan import Operand, Phase, Step
from hmc.predict.cost import COPY_PIECE
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work
from hmc.runtime.device_ops.link import Link
from hmc.runtime.device_ops.shares import Call, Share, of_share
from hmc.runtime.memory.kv import KVCache
from hmc.runtime.weights.torch_view import view


def copy(bound: Bound, step: Step) -> Work:
    """The same rows on another device: whole rows of the same type, so without a temporary."""
    pairs = [(bound.tensor(x), bound.tensor(step.outputs[role])) for role, x in step.inputs.items()]
    share = bound.share(step)

    def work(call: Call) -> None:
        count = call.count(share)
        for source, target in pairs:
            target[:count].copy_(source[:count], non_blocking=True)

    return work


def load(bound: Bound, step: Step) -> Work:
    """Weights from the host's one copy into a slot, or the dense ones back to their place; with an
    `order`, experts that some token of the call chose, and no others."""
    if "order" in step.inputs:
        return _load_chosen(bound, step, step.inputs["order"].buffer)
    pieces = _cut(bound.copies(step))

    def work(call: Call) -> None:
        _move(pieces)

    return work


def _load_chosen(bound: Bound, step: Step, order: str) -> Work:
    experts = {expert: _cut(found) for expert, found in bound.copies_of_experts(step).items()}

    def work(call: Call) -> None:
        edges = bound.sorted[order].counted
        for expert, pieces in experts.items():
            if edges[expert] < edges[expert + 1]:
                _move(pieces)

    return work


def _cut(copies: list[tuple[int, torch.Tensor]]) -> list[tuple[int, torch.Tensor]]:
    return [
        (address + first, target[first : first + COPY_PIECE])
        for address, target in copies
        for first in range(0, len(target), COPY_PIECE)
    ]


def _move(pieces: list[tuple[int, torch.Tensor]]) -> None:
    for address, target in pieces:
        target.copy_(view(address, torch.uint8, (len(target),)), non_blocking=True)


def kv_out(bound: Bound, step: Step) -> Work:
    """The call's new cache rows of a layer, in host memory, to the pages of the host's cache."""
    found, of_layer = _rows_by_state(bound, step), _heads(bound, step.layer)

    def block(some: slice, slots: torch.Tensor) -> None:
        block, place = slots // bound.kv.block, slots % bound.kv.block
        for state, parts in found.items():
            rows = [part[some].to(torch.bfloat16) for part in parts]
            values = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
            heads = of_layer if state in ("k", "v") else 1
            target = cached(bound.kv, step.layer, state, heads)
            target[block, :, place] = values.view(len(values), heads, -1)

    def work(call: Call) -> None:
        slots = torch.from_numpy(call.host_slots)
        for some in scratch.blocks(0, call.tokens, _row(found)):
            block(some, slots[some])

    return work


def cached(kv: KVCache, layer: int, state: str, heads: int = 1) -> torch.Tensor:
    """Pages of a layer's state in the host's cache, bf16 [blocks, heads, block, dim]; a view."""
    return torch.from_numpy(kv.array(layer, state, heads)).view(torch.bfloat16)


_ROWS = {
    "k": ("k",),
    "v": ("v",),
    "latent": ("latent", "k_rope"),
    "indexer_k": ("indexer_k",),
}
"""The inputs of attention whose columns, side by side, are a row of a state."""


def kv_in(bound: Bound, step: Step) -> Work:
    """The call's new cache rows of a layer, in host memory, to the home GPU's cache, for a prompt
    that another GPU computed."""
    found = _rows_by_state(bound, step)

    def block(some: slice, slots: torch.Tensor) -> None:
        for state, parts in found.items():
            cache = bound.cache(step.layer, state)
            rows = [
                part[some].to(cache.device, non_blocking=True).to(cache.dtype) for part in parts
            ]
            cache.index_copy_(0, slots, rows[0] if len(rows) == 1 else torch.cat(rows, 1))

    def work(call: Call) -> None:
        for some in scratch.blocks(0, call.tokens, _row(found)):
            block(some, call.slots[some])

    return work


def _rows_by_state(bound: Bound, step: Step) -> dict[str, list[torch.Tensor]]:
    """By state, the step's inputs whose columns, side by side, are its rows."""
    return {
        state: [bound.tensor(step.inputs[role]) for role in roles if role in step.inputs]
        for state, roles in _ROWS.items()
        if state in step.inputs
    }


def _row(found: dict[str, list[torch.Tensor]]) -> int:
    """Bytes that a row takes on its way: as it comes, in bf16, and once more in another layout."""
    parts = [part for parts in found.values() for part in parts]
    return sum(part.shape[1] * (part.element_size() + 2 + 2) for part in parts)


def _heads(bound: Bound, layer: int) -> int:
    for step in bound.phase.steps:
        if "kv_heads" in step.attrs and step.layer == layer:
            return int(step.attrs["kv_heads"])
    return 1


def gathered(
    share: Share, part: torch.Tensor, whole: torch.Tensor, tokens: int, rows: slice
) -> None:
    """Put `part`, which is `rows` of a share (the last of them may be missing in the call), where
    they are in the call: `whole` [tokens, width]."""
    # between devices, rows of another type or stride are made anew on both
    row = whole.shape[1] * (part.element_size() + whole.element_size())
    for mine, there in share.runs(tokens, rows):
        for some in scratch.blocks(mine.start, mine.stop, row):
            source = part[some.start - rows.start : some.stop - rows.start]
            start = there.start + some.start - mine.start
            whole[start : start + len(source)].copy_(source, non_blocking=True)


def all_gather(bound: Bound, step: Step) -> Work:
    """The rows of all ranks, in the order of the call, on every rank."""
    ranks = bound.phase.ranks
    if bound.link is not None:
        return _gather_over(bound.link, bound, step)
    parts = [(Share("rank", r, ranks), bound.tensor(step.inputs[f"x{r}"])) for r in range(ranks)]
    wholes = [bound.tensor(step.outputs[f"y{r}"]) for r in range(ranks)]

    def work(call: Call) -> None:
        for whole in wholes:
            for share, part in parts:
                gathered(share, part, whole, call.tokens, slice(0, call.count(share)))

    return work


def _gather_over(link: Link, bound: Bound, step: Step) -> Work:
    """As `all_gather`, from and to other processes; for attention, with the rows of the past, which
    rank 0 alone has."""
    part, whole = (bound.tensor(side[f"{role}{link.rank}"]) for side, role in _sides(step))
    shares = [Share("rank", rank, link.ranks) for rank in range(link.ranks)]
    reader = _feeds_attention(bound.phase, step)
    row = (1 + link.ranks) * whole.shape[1] * whole.element_size()  # what is sent and all found

    def block(call: Call, some: slice) -> None:
        found = link.gather(part[some].to(whole.dtype))
        for share, theirs in zip(shares, found, strict=True):
            gathered(share, theirs, whole, call.tokens, some)

    def work(call: Call) -> None:
        rows = max(call.count(share) for share in shares)  # padded: others may have more
        for some in scratch.blocks(0, rows, row):
            block(call, some)
        if reader in _ROWS and call.past:
            bound.share_past(call, step.layer, reader)

    return work


def _feeds_attention(phase: Phase, step: Step) -> str:
    """The role in which attention reads what a collective gathers; "" where it does not."""
    written = {operand.buffer for operand in step.outputs.values()}
    for reader in phase.steps:
        if reader.layer == step.layer and OPS[reader.op].attends:
            for role, operand in reader.inputs.items():
                if operand.buffer in written:
                    return role
    return ""


def exchange(bound: Bound, step: Step) -> Work:
    """Every rank's rows of the sum of all partial sums, in f32 and in the order of the ranks. Those
    of other ranks travel as bf16."""
    ranks = bound.phase.ranks
    if bound.link is not None:
        return _exchange_over(bound.link, bound, step)
    parts = [bound.tensor(operand) for operand in step.inputs.values()]
    sums = [(Share("rank", r, ranks), bound.tensor(step.outputs[f"y{r}"])) for r in range(ranks)]
    homes = [bound.place(operand) for operand in step.inputs.values()]
    places = [bound.place(step.outputs[f"y{r}"]) for r in range(ranks)]
    row = (2 + 4) * parts[0].shape[1]  # in bf16, which the CPU makes f32 to add it

    def work(call: Call) -> None:
        for (share, target), place in zip(sums, places, strict=True):
            for mine, there in share.runs(call.tokens, slice(0, call.count(share))):
                ahead = there.start - mine.start
                for some in scratch.blocks(mine.start, mine.stop, row):
                    theirs = slice(some.start + ahead, some.stop + ahead)
                    travelled = (
                        part[theirs] if home == place else part[theirs].to(torch.bfloat16)
                        for part, home in zip(parts, homes, strict=True)
                    )
                    _sum(travelled, target[some])

    return work


def _exchange_over(link: Link, bound: Bound, step: Step) -> Work:
    """As `exchange`, with the partial sums of other processes."""
    part, total = (bound.tensor(side[f"{role}{link.rank}"]) for side, role in _sides(step))
    shares = [Share("rank", rank, link.ranks) for rank in range(link.ranks)]
    # in bf16 what is sent, twice, and what is found; in f32 rows of two pieces, two ranks' at most,
    # and what the CPU makes of a bf16 row to add it
    row = part.shape[1] * (3 * 2 * (link.ranks - 1) + 3 * 4)

    def work(call: Call) -> None:
        counts = [call.count(share) for share in shares]
        for some in scratch.blocks(0, max(counts), row):  # as many with every rank
            mine = total[some.start : min(some.stop, counts[link.rank])]
            _sum(link.partial_sums(part, call.tokens, some), mine)

    return work


def _sides(step: Step) -> tuple[tuple[dict[str, Operand], str], tuple[dict[str, Operand], str]]:
    return (step.inputs, "x"), (step.outputs, "y")


def _sum(parts: Iterable[torch.Tensor], total: torch.Tensor) -> None:
    """f32 total = the sum of parts, in their order."""
    for number, part in enumerate(parts):
        rows = part.to(total.device, non_blocking=True)
        total.copy_(rows) if number == 0 else total.add_(rows)


def split(bound: Bound, step: Step) -> Work:
    """Each lane's rows of a batch."""
    x, lanes = bound.tensor(step.inputs["x"]), bound.phase.lanes
    parts = [(Share("lane", n, lanes), bound.tensor(step.outputs[f"y{n}"])) for n in range(lanes)]

    def work(call: Call) -> None:
        for share, part in parts:
            count = call.count(share)
            part[:count].copy_(of_share(x, share, call.tokens, slice(0, count)))

    return work


def join(bound: Bound, step: Step) -> Work:
    """The lanes' rows in the order of the batch."""
    y, lanes = bound.tensor(step.outputs["y"]), bound.phase.lanes
    parts = [(Share("lane", n, lanes), bound.tensor(step.inputs[f"x{n}"])) for n in range(lanes)]

    def work(call: Call) -> None:
        for share, part in parts:
            gathered(share, part, y, call.tokens, slice(0, call.count(share)))

    return work
