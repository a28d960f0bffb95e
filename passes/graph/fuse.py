"""Fuses what one kernel does better than several: gate+up+activation, and residual+norm.

Contract
    * requires "canonical"; establishes "fused"
    * silu_mul of two bias-free linears of one input, stored in one format, becomes gate_up: both
      weights are read in one pass over the input and the two results never reach memory
    * add whose sum a full-width norm reads becomes add_norm; a sum of two results added to the
      residual (routed and shared experts) is taken in as the third operand
    * the norm before the output layer stays alone: only the rows whose logits are wanted reach it
    * values are unchanged beyond the order of two additions
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.fx

from hmc.blocks import AddNorm, GateUp
from hmc.graph import NodeMeta, attrs, meta
from hmc.passes.records import Notes, Target, replace_with_module, submodule
from hmc.plan import Decision
from hmc.ranges import ranges


@dataclass(frozen=True)
class Fuse:
    """Forms gate_up and add_norm nodes."""

    name: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"fused"})

    def run(self, graph: torch.fx.GraphModule, target: Target) -> Sequence[Decision]:
        notes = Notes(self.name)
        nodes = list(graph.graph.nodes)
        gated = [meta(node).layer for node in nodes if _fuse_gate_up(graph, target, notes, node)]
        normed = [meta(node).layer for node in nodes if _fuse_add_norm(graph, node)]
        graph.graph.eliminate_dead_code()
        if gated:
            notes.decide(
                f"gate and up of {len(gated)} dense or shared MLPs",
                "fused",
                "one input, one format: both weights are read in one pass and the products stay"
                " in registers",
            )
        if normed:
            notes.decide(
                f"residual and norm of layers {ranges(set(normed))}",
                f"fused {len(normed)} times",
                "the sum is normalised while it is in cache: one record and one barrier less each",
            )
        return notes.made


def _fuse_gate_up(
    graph: torch.fx.GraphModule, target: Target, notes: Notes, node: torch.fx.Node
) -> bool:
    if meta(node).kind != "silu_mul":
        return False
    gate, up = node.args
    assert isinstance(gate, torch.fx.Node) and isinstance(up, torch.fx.Node)
    two = (meta(gate), meta(up))
    if (
        any(m.kind != "linear" or len(m.weights) != 1 for m in two)
        or gate.args[0] is not up.args[0]
    ):
        return False
    if len(gate.users) != 1 or len(up.users) != 1:
        return False
    formats = [target.source(m.weights[0])[0].format for m in two]
    if formats[0] != formats[1]:
        notes.decide(
            f"{two[0].weights[0].name} and {two[1].weights[0].name}",
            "not fused",
            f"stored in two formats, {formats[0]} and {formats[1]}",
        )
        return False
    fused = GateUp(submodule(graph, gate), submodule(graph, up))
    weights = tuple(
        replace(m.weights[0], role=role) for m, role in zip(two, ("gate", "up"), strict=True)
    )
    replace_with_module(
        graph,
        node,
        f"{gate.name}_up",
        fused,
        (gate.args[0],),  # type: ignore[arg-type]
        NodeMeta(
            "gate_up",
            two[0].layer,
            two[0].width,
            "bf16",
            two[0].section,
            weights,
            fused.attributes(),
        ),
    )
    for dead in (node, gate, up):
        graph.graph.erase_node(dead)
    return True


def _fuse_add_norm(graph: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    if meta(node).kind != "norm" or meta(node).attr("groups") != 1 or meta(node).section == "head":
        return False
    total = node.args[0]
    if not isinstance(total, torch.fx.Node) or meta(total).kind != "add":
        return False
    operands = list(total.args)
    second = operands[1]
    if isinstance(second, torch.fx.Node) and meta(second).kind == "add" and len(second.users) == 1:
        operands[1:] = second.args
    norm, layer = meta(node), meta(node).layer
    module = AddNorm(submodule(graph, node))
    name = f"{node.name}_added"
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(total):
        pair = graph.graph.call_module(name, tuple(operands))
        parts = [graph.graph.call_function(operator.getitem, (pair, index)) for index in (0, 1)]
    pair.meta["hmc"] = NodeMeta(
        "add_norm", layer, norm.width, "f32", norm.section, norm.weights, module.attributes()
    )
    for index, (part, dtype) in enumerate(zip(parts, ("f32", norm.dtype), strict=True)):
        part.meta["hmc"] = NodeMeta(
            "item",
            layer,
            norm.width,
            dtype,
            norm.section,
            attrs=attrs(index=index, offset=0, width=norm.width),
        )
    total.replace_all_uses_with(parts[0])
    node.replace_all_uses_with(parts[1])
    graph.graph.erase_node(node)
    graph.graph.erase_node(total)
    return True
