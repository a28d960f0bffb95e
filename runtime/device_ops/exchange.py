"""Moving rows: between host and devices, between ranks, between lanes, and weights into slots.

Loads are cut into pieces, between which copies of other streams get their turn.
Between ranks of one process rows are copied from device to device, between processes by `Link`;
both compute the same bits. Copies are asynchronous where
the host's memory is pinned; `kv_out` and `kv_in` wait for the device, because the host's cache is
paged and its rows are placed and picked by the CPU.
"""

from __future__ import annotations

import torch

from hmc.cost import COPY_PIECE
from hmc.plan import Operand, Step
from hmc.runtime.device_ops.base import Bound, Work
from hmc.runtime.ranks_link import Link
from hmc.runtime.ranks_traffic import Kind, feeds_attention
from hmc.runtime.shares import ALL, Call, Share, gathered, of_share
from hmc.runtime.weights import view


def copy(bound: Bound, step: Step) -> Work:
    """The same rows on another device."""
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
        _, edges = bound.sorted[order]
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
    """The call's new cache rows of a layer to the host's cache."""
    roles = [role for role in ("k", "v", "latent", "k_rope") if role in step.inputs]
    found = {role: bound.tensor(step.inputs[role]) for role in roles}
    heads = _heads(bound, step.layer)

    def work(call: Call) -> None:
        count = call.tokens
        rows = {
            role: part[:count].to(torch.bfloat16).to("cpu", non_blocking=False)
            for role, part in found.items()
        }
        parts = (
            (rows["k"], rows["v"])
            if "k" in rows
            else (torch.cat((rows["latent"], rows["k_rope"]), 1),)
        )
        slots = torch.from_numpy(call.host_slots)
        block, place = slots // bound.kv.block, slots % bound.kv.block
        for part, values in enumerate(parts):
            target = bound.kv.tensor(step.layer, part, heads)
            target[block, :, place] = values.view(count, heads, -1)

    return work


def kv_in(bound: Bound, step: Step) -> Work:
    """The call's new cache rows of a layer from the host's cache to the home GPU's, for a prompt
    that another GPU computed."""
    heads, parts = _heads(bound, step.layer), len(bound.plan.kv.widths)

    def work(call: Call) -> None:
        slots = torch.from_numpy(call.host_slots)
        block, place = slots // bound.kv.block, slots % bound.kv.block
        for part in range(parts):
            whole = bound.kv.tensor(step.layer, part, heads)
            cache = bound.cache(step.layer, part)
            rows = whole[block, :, place].flatten(1).to(cache.device)
            cache.index_copy_(0, call.slots, rows)

    return work


def _heads(bound: Bound, layer: int) -> int:
    for step in bound.phase.steps:
        if step.op == "attention" and step.layer == layer:
            return int(step.attrs["kv_heads"])
    return 1


def all_gather(bound: Bound, step: Step) -> Work:
    """The rows of all ranks, in the order of the call, on every rank."""
    ranks = bound.phase.ranks
    if bound.link is not None:
        return _gather_over(bound.link, bound, step)
    parts = [(Share("rank", r, ranks), bound.tensor(step.inputs[f"x{r}"])) for r in range(ranks)]
    wholes = [bound.tensor(step.outputs[f"y{r}"]) for r in range(ranks)]

    def work(call: Call) -> None:
        for whole in wholes:
            gathered(parts, whole, call.tokens)

    return work


def _gather_over(link: Link, bound: Bound, step: Step) -> Work:
    """As `all_gather`, from and to other processes; for attention, with the rows of the past, which
    rank 0 alone has."""
    part, whole = (bound.tensor(side[f"{role}{link.rank}"]) for side, role in _sides(step))
    shares = [Share("rank", rank, link.ranks) for rank in range(link.ranks)]
    reader = feeds_attention(bound.phase, step)
    kind: Kind = "context" if reader else "gathered"
    past = {"k": 0, "latent": 0, "v": 1}.get(reader)

    def work(call: Call) -> None:
        rows = max(call.count(share) for share in shares)  # padded: others may have more
        found = link.gather(part[:rows].to(whole.dtype), rows, step.layer, kind)
        gathered(zip(shares, found, strict=True), whole, call.tokens)
        if past is not None and call.past:
            bound.share_past(call, step.layer, past)

    return work


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

    def work(call: Call) -> None:
        for (share, target), place in zip(sums, places, strict=True):
            mine = [of_share(part, share, call.tokens) for part in parts]
            travelled = [
                rows if home == place else rows.to(torch.bfloat16)
                for rows, home in zip(mine, homes, strict=True)
            ]
            _sum(travelled, target[: call.count(share)])

    return work


def _exchange_over(link: Link, bound: Bound, step: Step) -> Work:
    """As `exchange`, with the partial sums of other processes."""
    part, total = (bound.tensor(side[f"{role}{link.rank}"]) for side, role in _sides(step))
    share = Share("rank", link.rank, link.ranks)

    def work(call: Call) -> None:
        _sum(link.partial_sums(part, call.tokens, step.layer), total[: call.count(share)])

    return work


def _sides(step: Step) -> tuple[tuple[dict[str, Operand], str], tuple[dict[str, Operand], str]]:
    return (step.inputs, "x"), (step.outputs, "y")


def _sum(parts: list[torch.Tensor], total: torch.Tensor) -> None:
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
            part[: call.count(share)].copy_(of_share(x, share, call.tokens))

    return work


def join(bound: Bound, step: Step) -> Work:
    """The lanes' rows in the order of the batch."""
    y, lanes = bound.tensor(step.outputs["y"]), bound.phase.lanes
    parts = [(Share("lane", n, lanes), bound.tensor(step.inputs[f"x{n}"])) for n in range(lanes)]

    def work(call: Call) -> None:
        gathered(parts, y[: call.count(ALL)], call.tokens)

    return work
