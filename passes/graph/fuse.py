"""Fuses what one kernel does better than several: residual+norm, gate+up+activation, and connected
pieces of a model file's own arithmetic.

Contract
    * add whose sum a full-width norm reads becomes add_norm; a sum of two results added to the
      residual (routed and shared experts) is taken in as the third operand
    * the norm before the output layer stays alone: only the rows whose logits are wanted reach it
    * a piece of arithmetic (pieces.py) of two linears of one input, stored in one format, both with
      a bias or none, becomes gate_up with the piece's expression: both weights are read in one pass
      over the input and the two results never reach memory
    * every other piece becomes one pointwise node, in bf16 where matmuls read it
    * matmuls read bf16: an f32 value that others read too is rounded for them by a node of its own
    * values are unchanged beyond the order of two additions
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.fx

from hmc.blocks import AddNorm, GateUp, Linear, Pointwise, RMSNorm
from hmc.codegen.expr import REDUCTIONS, leaf, substitute
from hmc.codegen.rowwise import Rowwise
from hmc.graph import DType, attrs, meta
from hmc.passes.graph.pieces import Piece, pieces
from hmc.passes.graph.trace import ADD, dtype_wanted, reads_bf16
from hmc.passes.records import Notes, Target, put_block, submodule
from hmc.plan import Decision
from hmc.ranges import ranges


@dataclass(frozen=True)
class Fuse:
    """Forms gate_up, add_norm and pointwise nodes."""

    name: ClassVar[str] = "fuse"

    def run(self, graph: torch.fx.GraphModule, target: Target) -> Sequence[Decision]:
        notes = Notes(self.name)
        normed = [meta(n).layer for n in list(graph.graph.nodes) if _fuse_add_norm(graph, n)]
        gated, joined = 0, Counter[str]()
        for piece in pieces(graph.graph):
            if _fuse_gate_up(graph, target, notes, piece):
                gated += 1
            elif _put_pointwise(graph, piece):
                joined[piece.form.text] += 1
        graph.graph.eliminate_dead_code()
        _round_for_matmuls(graph)
        if gated:
            notes.decide(
                f"gate and up of {gated} dense or shared MLPs",
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
        for text, count in joined.items():
            choice = f"one pointwise node, {count} times"
            notes.decide(text, choice, "read and written once, in one walk over rows")
        return notes.made


def _fuse_gate_up(graph: torch.fx.GraphModule, target: Target, notes: Notes, piece: Piece) -> bool:
    two = [submodule(graph, node) for node in piece.inputs]
    if len(two) != 2 or not all(isinstance(each, Linear) for each in two):
        return False
    (gate, up), tree = piece.inputs, piece.form.tree
    plain = not piece.vectors and not any(node.op in REDUCTIONS for node in tree)
    alike = {each.width for each in two} == {meta(piece.result).width}
    alike &= (two[0].bias is None) == (two[1].bias is None)
    alone = all(user in piece.members for node in (gate, up) for user in node.users)
    if not (plain and alike and alone) or gate.args[0] is not up.args[0]:
        return False
    if dtype_wanted(piece.result) != "bf16":
        return False
    weights = [meta(node).weights[0] for node in (gate, up)]
    formats = [target.source(weight)[0].format for weight in weights]
    if formats[0] != formats[1]:
        notes.decide(
            f"{weights[0].name} and {weights[1].name}",
            "not fused",
            f"stored in two formats, {formats[0]} and {formats[1]}",
        )
        return False
    names = dict(zip(tree.leaves, (leaf("gate"), leaf("up")), strict=True))
    block = GateUp(two[0], two[1], str(substitute(tree, names)))
    biases = [weight for node in (gate, up) for weight in meta(node).weights[1:]]
    roles = zip((*weights, *biases), ("gate", "up", "gate_bias", "up_bias"), strict=False)
    named = tuple(replace(weight, role=role) for weight, role in roles)
    inputs = gate.args[:1]
    fused = put_block(graph, piece.result, f"{gate.name}_up", block, inputs, meta(gate), named)
    piece.result.replace_all_uses_with(fused)
    return True


def _put_pointwise(graph: torch.fx.GraphModule, piece: Piece) -> bool:
    """A node for a piece; none, and False, where the piece only shapes its input."""
    dtype = dtype_wanted(piece.result)
    if piece.form.tree.name and meta(piece.inputs[0]).dtype == dtype:
        piece.result.replace_all_uses_with(piece.inputs[0])
        return False
    vectors = [submodule(graph, node) for node in piece.vectors.values()]
    block = Pointwise(piece.form, vectors, dtype)
    weights = tuple(
        replace(meta(node).weights[0], role=name) for name, node in piece.vectors.items()
    )
    old, name = piece.result, f"{piece.result.name}_fused"
    old.replace_all_uses_with(put_block(graph, old, name, block, piece.inputs, meta(old), weights))
    return True


def _round_for_matmuls(graph: torch.fx.GraphModule) -> None:
    """Give matmuls bf16 where what they read is f32."""
    rounded: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in list(graph.graph.nodes):
        if not reads_bf16(meta(node).kind) or meta(source := node.args[0]).dtype != "f32":
            continue
        if source not in rounded:
            about = meta(source)
            form = Rowwise.given("x0", {"width": about.width, "groups": 1, "x0": about.width})
            block = Pointwise(form, (), "bf16")
            name = f"{source.name}_rounded"
            rounded[source] = put_block(graph, source.next, name, block, (source,), about)
        node.replace_input_with(source, rounded[source])


def _fuse_add_norm(graph: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    if not isinstance(block := submodule(graph, node), RMSNorm) or block.groups != 1:
        return False
    if meta(node).section == "head" or meta(node).dtype != "bf16":
        return False
    total = node.args[0]
    if not isinstance(total, torch.fx.Node) or meta(total).kind != ADD:
        return False
    operands = list(total.args)
    second = operands[1]
    if isinstance(second, torch.fx.Node) and meta(second).kind == ADD and len(second.users) == 1:
        operands[1:] = second.args
    norm = meta(node)
    name = f"{node.name}_added"
    pair = put_block(graph, total, name, AddNorm(block), operands, norm, norm.weights)
    dtypes: tuple[DType, ...] = ("f32", "bf16")
    for index, (old, dtype) in enumerate(zip((total, node), dtypes, strict=True)):
        with graph.graph.inserting_before(total):
            part = graph.graph.call_function(operator.getitem, (pair, index))
        about = attrs(index=index, offset=0, width=norm.width)
        part.meta["hmc"] = norm.with_(kind="item", dtype=dtype, weights=(), attrs=about)
        old.replace_all_uses_with(part)
    graph.graph.erase_node(node)
    graph.graph.erase_node(total)
    return True
