"""A model on the meta device -> a torch.fx graph whose nodes are blocks, each with its `NodeMeta`.

Hides how torch.fx names and scopes nodes. Names come from the place in the model
("layers_3_mlp_experts"), so that they are the same in every run and can be told apart in a dump.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target

from hmc import env
from hmc.blocks import Block, Vector, place_of
from hmc.codegen.expr import MASKS, OPERATIONS, REDUCTIONS, Expr, leaf, substitute
from hmc.codegen.rowwise import Rowwise
from hmc.errors import CompileError, KernelError
from hmc.graph import Attr, DType, NodeMeta, Section, attrs, meta
from hmc.graph.printer import graph_text
from hmc.ops import OPS
from hmc.ops.pointwise import attributes
from hmc.passes.graph import arithmetic
from hmc.passes.graph.arithmetic import TOKENS, by_head, is_vector

POINTWISE, ADD = "pointwise", "add"
"""Kinds of what a model file writes itself: arithmetic, and the sum of two results."""


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace `model(ids, positions) -> logits`; every node of the result carries `NodeMeta`.

    The graph module shares the model's blocks and runs as the model does. The text of the graph
    goes to `HMC_DUMP/00-trace.txt`. Raises `CompileError` when the model does anything but call
    blocks and the functions of arithmetic.py.
    """
    tracer = _Tracer()
    graph = tracer.trace(model)
    reader = _Reader(model)
    for node in graph.nodes:
        node.meta["hmc"] = reader.read(node, *tracer.places[node])
    for node in graph.nodes:
        node.meta["hmc"] = _with_readers(node)
    env.dump("00-trace.txt", graph_text(graph))
    return fx.GraphModule(model, graph)


class _Tracer(fx.Tracer):
    """Keeps blocks whole, names nodes by where they stand, and remembers in `places` the path and
    what the module around said of its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[fx.Node, tuple[str, tuple[int, Section]]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Block)

    def create_node(
        self,
        kind: str,
        target: Target,
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        path = self.scope.module_path
        if kind in ("call_function", "call_method"):
            path = f"{path}.{getattr(target, '__name__', target)}".removeprefix(".")
        if kind in ("call_module", "call_function", "call_method"):
            name = path.removeprefix("model.").replace(".", "_")
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        self.places[node] = path, place_of(self.root.get_submodule(self.scope.module_path))
        return node


class _Reader:
    """Tells what each node of a trace is, in order, apart from what depends on its readers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values: dict[fx.Node, Tensor] = {}
        """On the meta device, of `TOKENS` tokens."""

    def read(self, node: fx.Node, path: str, place: tuple[int, Section]) -> NodeMeta:
        """The meta of the next node; `CompileError` for what hmc does not know."""
        layer, section = place
        if node.op == "placeholder":
            self._values[node] = torch.empty(TOKENS, dtype=torch.int32, device="meta")
            return NodeMeta("input", -1, 1, "i32")
        if node.op == "output":
            return NodeMeta("output", -1, meta(node.all_input_nodes[0]).width, "f32")
        if node.op == "call_module":
            return self._block(node, layer, section)
        if any(meta(each).section == "head" for each in node.all_input_nodes):
            section = "head"
        found = None
        if node.op in ("call_function", "call_method") and node.all_input_nodes:
            found = self._item(node) or self._arithmetic(node)
        if found is None:
            raise CompileError(
                f"cannot trace {node.format_node()} in {path or 'the model'}: a model file may call"
                " blocks (Vector for a weight of its own), and the functions that"
                " passes/graph/arithmetic.py lists, as it says"
            )
        return found.with_(layer=layer, section=section)

    def _block(self, node: fx.Node, layer: int, section: Section) -> NodeMeta:
        block = self._model.get_submodule(str(node.target))
        assert isinstance(block, Block)
        for each in node.all_input_nodes:
            value = self._values[each]
            if value.ndim == 3 or is_vector(value) or value.dtype == torch.bool:
                raise CompileError(
                    f"{node.name} reads {each.name}, which is not rows [T, width]: flatten(-2) puts"
                    " rows by head together"
                )
        shape = (block.width,) if isinstance(block, Vector) else (TOKENS, block.width)
        self._values[node] = torch.empty(shape, device="meta")
        return block.meta(layer, section, block.stored(str(node.target)))

    def _item(self, node: fx.Node) -> NodeMeta | None:
        """Columns of rows."""
        span, source = arithmetic.columns(node), node.all_input_nodes[0]
        value = self._values[source]
        if span is None or value.ndim != 2 or is_vector(value):
            return None
        first, last, _ = slice(*span).indices(value.shape[1])
        self._values[node] = arithmetic.shape_of(node, self._values)
        about = attrs(index=0, offset=first, width=last - first)
        return NodeMeta("item", -1, last - first, meta(source).dtype, attrs=about)

    def _arithmetic(self, node: fx.Node) -> NodeMeta | None:
        """A sum of two results, or what else an expression says."""
        found = arithmetic.expression(node)
        if found is None or any(meta(each).kind == "input" for each in found[1]):
            return None
        tree, operands = found
        values = [self._values[each] for each in operands]
        if any(each.dtype == torch.bool for each in values):
            return None  # a comparison chooses in `where`, and does nothing else
        result = self._values[node] = self._result(node, tree, values)
        if result.dtype == torch.bool:
            return NodeMeta("mask", -1, 1, "f32")
        alike = all(each.ndim == 2 and each.shape == result.shape for each in values)
        alike &= not is_vector(result)
        if alike and str(tree) == "x0 + x1" and {meta(each).dtype for each in operands} == {"f32"}:
            width = result.shape[1]
            return NodeMeta(ADD, -1, width, "f32", attrs=attrs(width=width))
        try:
            about = _form(tree, values, by_head(result))
        except KernelError as error:
            raise CompileError(f"{node.name}: {error}") from error
        return NodeMeta(POINTWISE, -1, _elements(result), "f32", attrs=about)

    def _result(self, node: fx.Node, tree: Expr, values: list[Tensor]) -> Tensor:
        """What a function gives, on the meta device; of one operation on values of one shape that
        shape, since torch's own answer loads its compiler, which takes a second.
        """
        keeps = tree.op in OPERATIONS and tree.op not in MASKS | REDUCTIONS
        single = all(not each.args for each in tree.args)
        if keeps and single and len({each.shape for each in values}) == 1:
            return torch.empty(values[0].shape, device="meta")
        return arithmetic.shape_of(node, self._values)


def _elements(value: Tensor) -> int:
    """Of a token's row, or of a vector."""
    return len(value) if is_vector(value) else value[0].numel()


def _form(tree: Expr, values: list[Tensor], by_group: bool) -> tuple[tuple[str, Attr], ...]:
    """Attributes of a function alone: inputs are x0, ..., whatever their dtype will be, and vectors
    v0, ..., or g0, ... where they have one element a head or are made `by_group` here.
    """
    heads = {value.shape[1] for value in values if value.ndim == 3}
    if len(heads) > 1:
        raise KernelError(f"rows by {' and '.join(map(str, sorted(heads)))} heads in one operation")
    names: dict[str, Expr] = {}
    columns: dict[str, int] = {}
    for name, value in zip(tree.leaves, values, strict=True):
        vector = "g" if by_group or by_head(value) else "v"
        stem = vector if is_vector(value) else "x"
        new = f"{stem}{sum(each[0] == stem for each in columns)}"
        names[name], columns[new] = leaf(new), _elements(value)
    text = str(substitute(tree, names))
    groups = max(heads, default=1) if tree.args else 1
    if by_group:
        groups = max(columns.values())
    wide = max(columns.values())
    # rows of one column a head beside a vector of a head's columns make rows of all columns
    vectors = [count for name, count in columns.items() if name[0] == "v"]
    if groups > 1 and wide == groups:
        wide = groups * max(vectors, default=1)
    form = Rowwise.given(text, {"width": wide, "groups": groups, **columns})
    return attrs(**attributes(form, "f32"))


def _with_readers(node: fx.Node) -> NodeMeta:
    """Complete a node's meta by who reads it: the format of a norm, and which linears are router
    gates.
    """
    about = meta(node)
    readers = [OPS[meta(user).kind] for user in node.users if meta(user).kind in OPS]
    row = OPS.get(about.kind)
    if row is None or not readers:
        return about
    if "out" in row.attrs and about.kind != POINTWISE:
        dtype = dtype_wanted(node)
        return about.with_(dtype=dtype, attrs=attrs(**dict(about.attrs) | {"out": dtype}))
    if "router" in row.extra and any(reader.everywhere for reader in readers):
        # a router's gate is small and decides which experts run: checkpoints keep it unquantised
        plain = tuple(replace(weight, linear=False) for weight in about.weights)
        return about.with_(attrs=attrs(**dict(about.attrs), router=1), weights=plain)
    return about


def dtype_wanted(node: fx.Node) -> DType:
    """In which format a node's result passes to its readers: bf16 where some need it, as matmuls
    do, and all others take it, as arithmetic does; else f32.
    """
    kinds = [meta(user).kind for user in node.users]
    narrow = [reads_bf16(kind) for kind in kinds]
    able = (one or kind in (POINTWISE, "mask") for one, kind in zip(narrow, kinds, strict=True))
    return "bf16" if any(narrow) and all(able) else "f32"


def reads_bf16(kind: str) -> bool:
    """Whether nodes of a kind read their activations in bf16 alone: the matmuls do."""
    return kind in OPS and OPS[kind].inputs[0].dtype == "bf16"
