"""Steps of the mixture of experts on a GPU, by Triton kernels: where an expert's rows begin stays
on the device.
"""

from __future__ import annotations

import torch

from hmc.ops.routing import Routing
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Sorted, Work, ints
from hmc.runtime.device_ops.gpu.dense import in_eights, weight_of
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.device_ops.triton import launch, routing


def route(bound: Bound, step: Step) -> Work:
    """Expert ids and weights of every row, best first; ties go to the lower id."""
    logits, share = bound.tensor(step.inputs["logits"]), bound.share(step)
    ids, weights = (bound.tensor(step.outputs[role]) for role in ("ids", "routing"))
    bias, scale = (bound.vector(step, role) for role in ("bias", "scale"))
    about = Routing.of(step.attrs)

    def work(call: Call) -> None:
        count = call.count(share)
        routing.route(logits[:count], bias, scale, ids[:count], weights[:count], about)

    return work


def sort(bound: Bound, step: Step) -> Work:
    """Slots (token * top_k + rank of its expert) in the order of their experts."""
    ids, order = bound.tensor(step.inputs["ids"]), bound.tensor(step.outputs["order"])
    share, name, space = bound.share(step), step.outputs["order"].buffer, bound.workspace(step)
    edges = _edges(bound.plan.model.experts, ids.device)

    def work(call: Call) -> None:
        count = call.count(share)
        found = Sorted(order[:count].view(-1), edges)
        routing.by_expert(ids[:count], found.slots, found.edges, space)
        bound.sorted[name] = found

    return work


def experts(bound: Bound, step: Step) -> Work:
    """y = the weighted sum over those of a row's experts that the step has, added to y where
    earlier steps have others.
    """
    x, ids, weights = (bound.tensor(step.inputs[role]) for role in ("x", "ids", "routing"))
    y, share, space = bound.tensor(step.outputs["y"]), bound.share(step), bound.workspace(step)
    count_all, top_k = ints(step, "experts", "top_k")
    adds, act = bound.adds(step), str(step.attrs["act"])
    name = step.inputs["order"].buffer if "order" in step.inputs else ""
    held = launch.Experts.of(
        (number, tuple(map(weight_of, (*each.into, each.down))), each.biases)
        for number, each in bound.experts(step).items()
    )
    eights, edges = in_eights(held.into, x.device), _edges(count_all, ids.device)

    def chosen(count: int) -> Sorted:
        if name:
            return bound.sorted[name]
        order = torch.empty(count * top_k, dtype=torch.int32, device=ids.device)
        routing.by_expert(ids[:count], order, edges, space)
        return Sorted(order, edges)

    def work(call: Call) -> None:
        count = call.count(share)
        found = chosen(count)
        launch.experts(
            x[:count].contiguous(),
            found.slots,
            found.edges,
            weights[:count].reshape(-1),
            held,
            space,
            y[:count],
            top_k=top_k,
            adds=adds,
            act=act,
            budget=scratch.BYTES // 2,
            eights=eights,
        )

    return work


def _edges(experts: int, device: torch.device) -> torch.Tensor:
    return torch.empty(experts + 1, dtype=torch.int32, device=device)
