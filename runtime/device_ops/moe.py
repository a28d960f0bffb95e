"""The mixture of experts on a device that the CPU plays: routing, sorting, and the experts that are
there.

Experts are computed one after the other over the rows routed to them, so an expert's weights are
read once a step. (On GPUs: runtime/device_ops/gpu/routed.py.)
"""

from __future__ import annotations

import torch

from hmc.blocks.moe import chosen_by_table, scored
from hmc.blocks.pointwise import activated
from hmc.codegen.expr import parse, temporaries, weighs
from hmc.errors import ExecutionError, wrong_table
from hmc.ops.routing import Routing
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Sorted, Work, in_blocks, ints
from hmc.runtime.device_ops.matmul import Expert, matmul, row_bytes
from hmc.runtime.device_ops.shares import Call, of_share

SOFTMAX, SIGMOID, SOFTMAX_CHOSEN, SIGMOID_CHOSEN, SPARSEMIXER, SQRT_SOFTPLUS = range(6)
_TAKEN = -(2**31)
_ROUTED = 4 * 4 + (4 + 8) * 2
"""Bytes of a logit in `routed`: itself, score, choice and key, and what a sort makes of the key and
its place, twice."""


def route(bound: Bound, step: Step) -> Work:
    """Expert ids and weights of every row, best first; ties go to the lower id."""
    logits, share = bound.tensor(step.inputs["logits"]), bound.share(step)
    ids, routing = (bound.tensor(step.outputs[role]) for role in ("ids", "routing"))
    bias, scale = (bound.vector(step, role) for role in ("bias", "scale"))
    top_k, about = int(step.attrs["top_k"]), Routing.of(step.attrs)

    row = _ROUTED * logits.shape[1]

    def block(part: slice) -> None:
        wide = None if bias is None else bias.to(torch.float32)  # now, that weights are there
        chosen, weights = routed(logits[part].to(torch.float32), wide, top_k, about)
        ids[part].copy_(chosen)
        weights *= about.factor
        routing[part].copy_(weights if scale is None else weights.mul_(scale[chosen]))

    return in_blocks(share, row, block)


def hash_route(bound: Bound, step: Step) -> Work:
    """Experts that a table has for the ids of a call's tokens, which the host knows."""
    logits, share = bound.tensor(step.inputs["logits"]), bound.share(step)
    ids, routing = (bound.tensor(step.outputs[role]) for role in ("ids", "routing"))
    experts, vocab = ints(step, "experts", "vocab")
    right: list[bool] = []

    def work(call: Call) -> None:
        stored = bound.vector(step, "table")
        assert stored is not None
        table = stored.view(vocab, -1)
        if not right:  # looked at once
            right.append(bool((table >= 0).all() and (table < experts).all()))
        if not right[0]:
            raise ExecutionError(wrong_table(step.weights["table"], experts))
        given = torch.from_numpy(call.ids).long().to(logits.device)
        for part in scratch.blocks(0, call.count(share), _ROUTED * experts):
            token = of_share(given[:, None], share, call.tokens, part)[:, 0]
            chosen = table[token].long()
            found, weights = chosen_by_table(step.attrs, logits[part].to(torch.float32), chosen)
            ids[part].copy_(found)
            routing[part].copy_(weights)

    return work


def routed(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, about: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids i64, weights f32) [T, top_k] of f32 logits [T, experts], but for factor and scales, with
    the order of scores and the ties of codegen/kernels/routing/route.py.
    """
    scoring, groups = about.scoring, about.groups
    scores = scored(scoring, logits)
    choice = scores if bias is None else scores + bias
    keys = ordered_keys(choice)
    if about.top_groups:
        best = choice.view(len(choice), groups, -1).topk(about.group_best, -1).values
        kept = _best(ordered_keys(best.sum(-1)), about.top_groups)
        worth = best[..., 0]
        out = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
        keys = keys.masked_fill(out.repeat_interleave(choice.shape[1] // groups, 1), _TAKEN)
    ids = _best(keys, top_k)
    weights = scores.gather(1, ids)
    if scoring == SOFTMAX_CHOSEN:
        weights = weights.softmax(-1)
    elif scoring == SIGMOID_CHOSEN:
        weights = weights.sigmoid()
    elif scoring == SPARSEMIXER:
        weights = _mixed(scores, ids, about.jitter)
    if about.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + about.eps)
    return ids, weights


def _mixed(scores: torch.Tensor, ids: torch.Tensor, jitter: float) -> torch.Tensor:
    """Each slot's share among the experts not taken before it and near their best."""
    left, weights = scores.clone(), torch.empty(ids.shape, device=scores.device)
    for slot in range(ids.shape[1]):
        own, best = ids[:, slot : slot + 1], left.amax(-1, keepdim=True)
        far = (best - left) / torch.maximum(left.abs(), best) > 2 * jitter
        shares = (left - best).exp_().masked_fill_(far | (left == float("-inf")), 0.0)
        mine = (left.gather(1, own) - best).exp_()
        weights[:, slot : slot + 1] = mine / shares.sum(-1, keepdim=True)
        left.scatter_(1, own, float("-inf"))
    return weights


def ordered_keys(values: torch.Tensor) -> torch.Tensor:
    """i32 ordered as f32 `values` are: NaN as -inf, both zeros equal, all above `_TAKEN`."""
    clean = values.masked_fill(values.isnan(), float("-inf")) + 0.0
    bits = clean.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & (2**31 - 1))


def _best(keys: torch.Tensor, count: int) -> torch.Tensor:
    return keys.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def sort(bound: Bound, step: Step) -> Work:
    """Slots (token * top_k + rank of its expert) in the order of their experts.

    A sort is of all rows at once: some 40 bytes a slot.
    """
    ids, order = bound.tensor(step.inputs["ids"]), bound.tensor(step.outputs["order"])
    share, name = bound.share(step), step.outputs["order"].buffer
    experts = bound.plan.model.experts

    def work(call: Call) -> None:
        count = call.count(share)
        found = by_expert(ids[:count], experts)
        order[:count].view(-1).copy_(found.slots)
        bound.sorted[name] = Sorted(order[:count].view(-1), found.edges)

    return work


def by_expert(ids: torch.Tensor, experts: int) -> Sorted:
    """Slots i64 sorted by expert, ascending within each; negative ids come first and belong to
    none.
    """
    flat = ids.reshape(-1)
    found, slots = flat.sort(stable=True)
    firsts = torch.arange(experts + 1, dtype=found.dtype, device=found.device)
    return Sorted(slots, torch.searchsorted(found, firsts))


def experts(bound: Bound, step: Step) -> Work:
    """y = the weighted sum over those of a row's experts that the step has, added to y where
    earlier steps have others.
    """
    x, ids, routing = (bound.tensor(step.inputs[role]) for role in ("x", "ids", "routing"))
    y, share, weights = bound.tensor(step.outputs["y"]), bound.share(step), bound.experts(step)
    count_all, top_k = ints(step, "experts", "top_k")
    order = step.inputs["order"].buffer if "order" in step.inputs else ""
    adds, act = bound.adds(step), str(step.attrs["act"])
    held, weighed = 2 + temporaries(parse(act)), weighs(act)
    row = max((_expert_row(expert, held) for expert in weights.values()), default=1)

    def block(
        expert: Expert, mine: torch.Tensor, factors: torch.Tensor, into: torch.Tensor
    ) -> None:
        tokens, shares = mine // top_k, factors[mine, None]
        rows, biases = x[tokens], expert.biases or (None, None, None)
        *gate, up = (
            _with_bias(matmul(rows, w), bias) for w, bias in zip(expert.into, biases, strict=False)
        )
        hidden = activated(act, gate[0] if gate else None, up, shares).to(torch.bfloat16)
        found = _with_bias(matmul(hidden, expert.down), biases[-1])
        # an expert has a token once, so no two rows of one block add to the same place
        into.index_add_(0, tokens, found if weighed else found.mul_(shares))

    def work(call: Call) -> None:
        count = call.count(share)
        total = y[:count]
        if not adds:
            total.zero_()
        chosen = bound.sorted[order] if order else by_expert(ids[:count], count_all)
        slots, edges = chosen.slots, chosen.counted
        factors = routing[:count].reshape(-1)
        for expert, own in weights.items():
            for part in scratch.blocks(edges[expert], edges[expert + 1], row):
                block(own, slots[part].long(), factors, total)

    return work


def _expert_row(expert: Expert, held: int) -> int:
    """Bytes that a row routed to an expert takes at most: slot, token, weight, x in bf16, the first
    product with what the second makes, or `held` products and what is made of them, or the
    activations in bf16 with what the last makes."""
    hidden, width = expert.up.shape
    inner = 4 * hidden + max(row_bytes(expert.up), 4 * hidden * (held - 1))
    return 8 + 8 + 4 + 2 * width + max(inner, 2 * hidden + row_bytes(expert.down))


def _with_bias(found: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return found if bias is None else found.add_(bias.to(torch.float32))
