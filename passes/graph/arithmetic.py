"""The plain torch functions that a model file may use beside blocks, and the expression that each
stands for; hides in how many ways torch lets one write the same.

    operators      + - * / and - of one, ** with 2, 0.5 and -0.5, < <= > >=
    functions      exp sqrt rsqrt square relu sigmoid silu gelu tanh softplus minimum maximum clamp
                   where, and the tensor's methods of these names
    sums           sum and mean over the last dimension, with keepdim=True
    shapes         x[..., a:b] of rows; unflatten, flatten, unsqueeze, reshape and view that keep
                   tokens first, which take a row apart by heads and put it together

Values are rows [T, width], rows by head [T, heads, width], or vectors, which are weights (`Vector`)
and what is made of weights alone; a vector with one element a head is unsqueezed, [heads, 1], where
rows by head read it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.nn import functional

from hmc.codegen.expr import Expr, apply, const, leaf
from hmc.errors import CompileError, KernelError

TOKENS: Final = 7919
"""Tokens of the values that `shape_of` runs functions on: no other dimension is as long."""

_SAME: Final[dict[Any, str]] = {
    **dict.fromkeys((operator.add, torch.add, "add"), "add"),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), "sub"),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), "mul"),
    **dict.fromkeys((operator.truediv, torch.div, "div"), "div"),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), "neg"),
    **dict.fromkeys((operator.lt, torch.lt, "lt"), "less"),
    **dict.fromkeys((operator.le, torch.le, "le"), "less_equal"),
    **dict.fromkeys((torch.exp, "exp"), "exp"),
    **dict.fromkeys((torch.sqrt, "sqrt"), "sqrt"),
    **dict.fromkeys((torch.rsqrt, "rsqrt"), "rsqrt"),
    **dict.fromkeys((torch.square, "square"), "square"),
    **dict.fromkeys((torch.relu, functional.relu, "relu"), "relu"),
    **dict.fromkeys((torch.sigmoid, functional.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((torch.tanh, functional.tanh, "tanh"), "tanh"),
    **dict.fromkeys((torch.minimum, "minimum"), "minimum"),
    **dict.fromkeys((torch.maximum, "maximum"), "maximum"),
    functional.silu: "silu",
    functional.softplus: "softplus",
    torch.where: "where",
}
"""Functions that are operations with the same arguments."""
_SWAPPED: Final[dict[Any, str]] = {
    **dict.fromkeys((operator.gt, torch.gt, "gt"), "less"),
    **dict.fromkeys((operator.ge, torch.ge, "ge"), "less_equal"),
}
_SUMS: Final[dict[Any, str]] = {
    **dict.fromkeys((torch.sum, "sum"), "sum"),
    **dict.fromkeys((torch.mean, "mean"), "mean"),
}
_POWERS: Final = {2: "square", 0.5: "sqrt", -0.5: "rsqrt"}
_SHAPES: Final = frozenset(("unflatten", "flatten", "unsqueeze", "reshape", "view"))
_CLAMPS: Final = (torch.clamp, "clamp")
_POWER: Final = (operator.pow, torch.pow, "pow")

Operand = Callable[[Any], Expr]


def expression(node: fx.Node) -> tuple[Expr, list[fx.Node]] | None:
    """What a function node computes: an expression, and the nodes that its leaves are, in order;
    None where the function is not one of those above, or is used in another way. The comparison
    that a `where` chooses by is part of it.
    """
    operands: dict[fx.Node, str] = {}

    def operand(value: Any) -> Expr:
        if isinstance(value, fx.Node):
            return leaf(operands.setdefault(value, f"x{len(operands)}"))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _OtherUse
        return const(value)

    try:
        tree = _tree(node, operand)
    except (_OtherUse, KernelError):
        return None
    nodes = {name: each for each, name in operands.items()}
    return tree, [nodes[name] for name in tree.leaves]


class _OtherUse(Exception):
    """A function that is known is used in a way that is not."""


def _tree(node: fx.Node, operand: Operand) -> Expr:
    function, args, named = node.target, node.args, dict(node.kwargs)
    if named.get("inplace") is False:  # torch's own default, which it writes into the trace
        del named["inplace"]
    if function in _CLAMPS:
        low, high = (*args[1:], *(named.pop(each, None) for each in ("min", "max")))[:2]
        tree = operand(args[0])
        tree = tree if low is None else apply("maximum", tree, operand(low))
        tree = tree if high is None else apply("minimum", tree, operand(high))
    elif function in _POWER:
        tree = _power(args, operand)
    elif function in _SUMS:
        dim, keep = named.pop("dim", None), named.pop("keepdim", False)
        if keep is not True or (*args[1:], *(() if dim is None else (dim,))) != (-1,):
            raise _OtherUse
        tree = apply(_SUMS[function], operand(args[0]))
    elif function == functional.gelu:
        kinds = {"none": "gelu", "tanh": "gelu_tanh"}
        tree = apply(kinds[str(named.pop("approximate", "none"))], operand(args[0]))
    elif node.op == "call_method" and function in _SHAPES:
        return operand(args[0])  # how its arguments are named does not matter: shape_of runs it
    elif function in _SWAPPED:
        first, second = args
        tree = apply(_SWAPPED[function], operand(second), operand(first))
    elif function in _SAME:
        values = [operand(arg) for arg in args]
        chosen = args[0]
        if _SAME[function] == "where" and isinstance(chosen, fx.Node):
            values[0] = _tree(chosen, operand)
        tree = apply(_SAME[function], *values)
    else:
        raise _OtherUse
    if named:
        raise _OtherUse
    return tree


def _power(args: tuple[Any, ...], operand: Operand) -> Expr:
    base, power = args
    if isinstance(power, fx.Node) or power not in _POWERS:
        raise _OtherUse
    return apply(_POWERS[power], operand(base))


def columns(node: fx.Node) -> tuple[int | None, int | None] | None:
    """[first, last) of a node that takes columns of rows, as written; None for any other node."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    rows, picked = (*node.args[1], None, None)[:2]
    whole = rows is Ellipsis or rows == slice(None)
    if len(node.args[1]) != 2 or not whole or not isinstance(picked, slice):
        return None
    start, stop, step = picked.start, picked.stop, picked.step
    if step not in (None, 1) or not all(isinstance(n, int | None) for n in (start, stop)):
        return None
    return start, stop


def shape_of(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    """What a function node gives for `values` of its inputs, meta tensors; `CompileError` where
    torch refuses them or the result is none of the three kinds of values.
    """

    def value(arg: fx.Node) -> Tensor:
        return values[arg]

    args = fx.node.map_arg(node.args, value)
    named = fx.node.map_arg(node.kwargs, value)
    try:
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **named)
        else:
            result = node.target(*args, **named)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise CompileError(f"{node.name}: {str(error).splitlines()[0]}") from error
    if not isinstance(result, Tensor) or not (
        is_vector(result) or (result.ndim in (2, 3) and len(result) == TOKENS)
    ):
        raise CompileError(
            f"{node.name}: the result is neither rows [T, width] nor by head [T, heads, width]"
        )
    return result


def is_vector(value: Tensor) -> bool:
    """Whether a value is made of weights alone."""
    return len(value) != TOKENS and (value.ndim == 1 or by_head(value))


def by_head(value: Tensor) -> bool:
    """Whether a value is a vector with one element a head."""
    return value.ndim == 2 and len(value) != TOKENS and value.shape[1] == 1
