"""Connected pieces of a graph's own arithmetic, each as one expression over rows.

A piece grows from its result backwards: a function whose value nobody outside reads is taken in, as
long as one kernel can compute the whole (`_fits`), but none of the layers into the head, which
works on other rows. What is made of weights alone is taken in
wherever it is read, and computed there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.fx

from hmc.codegen.expr import REDUCTIONS, Expr, leaf, substitute
from hmc.codegen.rowwise import BY_GROUP, F32_INPUTS, VECTORS, WEIGHTS, Rowwise
from hmc.errors import KernelError
from hmc.graph import meta
from hmc.ops.pointwise import rowwise
from hmc.passes.graph.arithmetic import expression
from hmc.passes.graph.trace import ADD, POINTWISE

Node = torch.fx.Node
Leaf = tuple[Node, bool]
"""What an expression reads, and whether it is a vector with one element for each group."""


@dataclass(frozen=True)
class Piece:
    """What `form` computes of `inputs` (in the order of the operands' names, x0, ..., b0, ...) and
    of `vectors` by theirs, instead of the node `result`.
    """

    result: Node
    members: frozenset[Node]
    form: Rowwise
    inputs: tuple[Node, ...]
    vectors: Mapping[str, Node]


def pieces(graph: torch.fx.Graph) -> Iterator[Piece]:
    """All pieces in the graph's order. Whoever takes one puts something in the place of its result
    before he takes the next, which may read it.
    """
    taken: set[Node] = set()
    found = []
    for node in reversed(graph.nodes):
        if node in taken or not _computes(node) or _of_weights(node):
            continue
        members = _grown(node)
        if any(meta(each).kind == POINTWISE for each in members):  # sums alone stay sums
            taken |= members
            found.append((node, members))
    for result, members in reversed(found):
        yield _piece(result, members)


def _in_head(node: Node) -> bool:
    return meta(node).section == "head"


def _computes(node: Node) -> bool:
    return node.op != "call_module" and meta(node).kind in (POINTWISE, ADD)


def _of_weights(node: Node) -> bool:
    """Whether a value is a weight or made of weights alone."""
    about = meta(node)
    return about.kind == "vector" or (
        about.kind == POINTWISE and all(name in WEIGHTS for name, _ in _form(node).columns)
    )


def _form(node: Node) -> Rowwise:
    about = meta(node)
    if about.kind == ADD:
        width = about.width
        return Rowwise.given("x0 + x1", {"width": width, "groups": 1, "x0": width, "x1": width})
    return rowwise(dict(about.attrs))


def _operands(node: Node) -> tuple[Expr, list[Node]]:
    found = expression(node)
    assert found is not None
    return found


def _grown(result: Node) -> set[Node]:
    """The members of the piece that gives `result`."""
    members = {result}
    waiting = list(result.all_input_nodes)
    while waiting:
        node = waiting.pop(0)
        if node in members or any(user not in members for user in node.users):
            continue
        joins = _computes(node) and _in_head(node) == _in_head(result)
        compared = meta(node).kind == "mask"  # what it compares is part of the `where` already
        if not compared and not (joins and _fits(result, members | {node})):
            continue
        members.add(node)
        waiting += node.all_input_nodes
    return members


def _joined(result: Node, members: set[Node]) -> tuple[Expr, list[Leaf]]:
    """The expression of a piece, and what its leaves are, in the order in which it reads them;
    `KernelError` where it is too large for one.
    """
    names: dict[Leaf, str] = {}

    def tree_of(node: Node, by_group: bool) -> Expr:
        tree, operands = _operands(node)
        values = []
        for name, each in zip(_form(node).tree.leaves, operands, strict=True):
            read = (each, by_group or name in BY_GROUP)
            inlined = _inlined(each, members)
            values.append(
                tree_of(*read) if inlined else leaf(names.setdefault(read, f"x{len(names)}"))
            )
        return substitute(tree, dict(zip(tree.leaves, values, strict=True)))

    return tree_of(result, False), list(names)


def _fits(result: Node, members: set[Node]) -> bool:
    """Whether one kernel can compute a piece."""
    try:
        _, leaves = _joined(result, members)
    except KernelError:
        return False
    rows = [each for each, _ in leaves if not _of_weights(each)]
    by_group = sum(by_group for _, by_group in leaves)
    vectors = len(leaves) - len(rows) - by_group
    if len(rows) > len(F32_INPUTS) or vectors > len(VECTORS) or by_group > len(BY_GROUP):
        return False
    computing = [node for node in members if _computes(node)]
    forms = [_form(node) for node in computing]
    width, groups = max(form.width for form in forms), max(form.groups for form in forms)
    if width % groups:
        return False
    if any(meta(each).width not in (width, groups) for each in rows):
        return False
    return all(
        meta(node).width in (width, groups) and _same_frame(form, width, groups)
        for node, form in zip(computing, forms, strict=True)
    )


def _same_frame(form: Rowwise, width: int, groups: int) -> bool:
    """Whether a function means the same over rows of `width` columns in `groups`."""
    if form.groups == groups:
        return form.width in (width, groups)
    if form.groups != 1 or form.width not in (width, groups):
        return False
    # a function of rows that are not by head: element by element it means the same by head
    vectors = {count for name, count in form.columns if name in VECTORS} - {1}
    sums = any(node.op in REDUCTIONS for node in form.tree)
    return not sums and vectors <= ({width} if form.width == width else set())


def _inlined(node: Node, members: set[Node]) -> bool:
    """Whether a value is computed where it is read."""
    return node in members or (_computes(node) and _of_weights(node))


def _piece(result: Node, members: set[Node]) -> Piece:
    tree, leaves = _joined(result, members)
    named: dict[Leaf, str] = {}
    for stem in "xbvg":
        wanted = [each for each in leaves if _stem(*each) == stem]
        named |= {each: f"{stem}{number}" for number, each in enumerate(wanted)}
    tree = substitute(tree, {f"x{n}": leaf(named[each]) for n, each in enumerate(leaves)})
    forms = [_form(node) for node in members if _computes(node)]
    sizes = {name: meta(each).width for (each, _), name in named.items()}
    sizes |= {
        "width": max(form.width for form in forms),
        "groups": max(form.groups for form in forms),
    }
    inputs = tuple(each for (each, _), name in named.items() if name not in WEIGHTS)
    vectors = {name: each for (each, _), name in named.items() if name in WEIGHTS}
    form = Rowwise.given(str(tree), sizes)
    return Piece(result, frozenset(members), form, inputs, vectors)


def _stem(node: Node, by_group: bool) -> str:
    if not _of_weights(node):
        return "b" if meta(node).dtype == "bf16" else "x"
    return "g" if by_group else "v"
