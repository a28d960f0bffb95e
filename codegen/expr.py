"""Expressions: the arithmetic between matmuls as trees of a closed list of operations, with one
text form.

    silu(gate) * up
    x0 * rsqrt(mean(square(x0)) + 1e-06) * (v0 + 1.0)

A tree is a value of a kernel's spec and of a plan, as its text: `parse(str(tree)) == tree`, and
equal trees have equal texts. What the operations mean is given by tables, one for each place that
computes them: vectors (codegen/functions.py) and torch (hmc/blocks/pointwise.py); `evaluate` walks
a tree by any of them. Nothing here needs more than Python.

Leaves are names of operands and f32 constants. `sum` and `mean` run over a row, or over each of its
groups; comparisons only choose in `where`. `gelu` is the one by erf, `gelu_tanh` its usual
approximation. Depth and size are bounded, so that no text makes a walk or a kernel long.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Generic, TypeVar

from hmc.errors import KernelError

T = TypeVar("T")

OPERATIONS: Final[dict[str, int]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "less", "less_equal", "minimum", "maximum"), 2),
    **dict.fromkeys(
        ("neg", "exp", "sqrt", "rsqrt", "square", "relu", "sigmoid", "silu", "tanh"), 1
    ),
    **dict.fromkeys(("gelu", "gelu_tanh", "softplus", "sum", "mean"), 1),
    "where": 3,
}
"""How many arguments each operation takes."""
MASKS: Final = frozenset(("less", "less_equal"))
"""Operations whose result chooses in `where` and does nothing else."""
REDUCTIONS: Final = frozenset(("sum", "mean"))
MAX_DEPTH, MAX_SIZE = 32, 128
"""Bounds of a tree: operations one inside the other, and nodes."""

GATED: Final = ("gate", "up")
"""Operands of an MLP's activation: the two products, with their biases; of one without a gate the
second alone."""
WEIGHT: Final = "weight"
ROUTED: Final = (*GATED, WEIGHT)
"""Those of routed experts': also the weight of the expert for the token, where an expert's input is
weighed instead of its result."""
SWIGLU: Final = "silu(gate) * up"
"""The activation of most gated MLPs (Shazeer, arXiv 2002.05202)."""

_LEAF, _CONST = "leaf", "const"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TOKEN = re.compile(r"(?:(\d+(?:\.\d*)?(?:e[+-]?\d+)?)|([a-z][a-z0-9_]*)|(<=|[-+*/<(),]))")
_INFIX = {
    **{"less": ("<", 0), "less_equal": ("<=", 0)},
    **{"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)},
}
"""Operations written between their arguments: sign and how strongly it binds."""
_SIGNS = {sign: (op, strength) for op, (sign, strength) in _INFIX.items()}
_MINUS, _ATOM = 3, 4


@dataclass(frozen=True)
class Expr:
    """A node and all below it; made by `leaf`, `const`, `apply` and `parse`.

    `op` is one of `OPERATIONS`, "leaf" with a `name`, or "const" with a `value`. Raises
    `KernelError` for what breaks a rule of the module's docstring.
    """

    op: str
    args: tuple[Expr, ...] = ()
    name: str = ""
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.op == _LEAF:
            if not _NAME.fullmatch(self.name) or self.name in OPERATIONS:
                raise KernelError(f"expression: {self.name!r} is no name of an operand")
        elif self.op == _CONST:
            if not math.isfinite(self.value):
                raise KernelError(f"expression: the constant {self.value} is not finite")
        else:
            self._check_operation()

    def _check_operation(self) -> None:
        if self.op not in OPERATIONS:
            raise KernelError(
                f"expression: unknown operation {self.op!r}; known are {', '.join(OPERATIONS)}"
            )
        if len(self.args) != OPERATIONS[self.op]:
            raise KernelError(
                f"expression: {self.op} takes {OPERATIONS[self.op]} arguments, not {len(self.args)}"
            )
        for place, arg in enumerate(self.args):
            wanted = self.op == "where" and place == 0
            if (arg.op in MASKS) != wanted:
                raise KernelError(
                    f"expression: argument {place + 1} of {self.op} is"
                    f" {'no comparison' if wanted else 'a comparison'}"
                )
        if not self.leaves:
            raise KernelError(f"expression: {self.op} of constants alone is a constant: write that")
        if self.depth > MAX_DEPTH or self.size > MAX_SIZE:
            raise KernelError(
                f"expression: {self.size} nodes, {self.depth} deep; at most {MAX_SIZE},"
                f" {MAX_DEPTH} deep"
            )

    @cached_property
    def depth(self) -> int:
        """Operations one inside the other."""
        return 1 + max(arg.depth for arg in self.args) if self.args else 0

    @cached_property
    def size(self) -> int:
        """Nodes of the tree."""
        return 1 + sum(arg.size for arg in self.args)

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """Names of the operands, in order of first appearance."""
        if self.op == _LEAF:
            return (self.name,)
        return tuple(dict.fromkeys(name for arg in self.args for name in arg.leaves))

    def __iter__(self) -> Iterator[Expr]:
        """Every node, arguments before what is made of them."""
        for arg in self.args:
            yield from arg
        yield self

    def __str__(self) -> str:
        return _text(self)[0]


def activation(text: str, operands: tuple[str, ...] = GATED) -> Expr:
    """The expression between the matmuls of a gated MLP; `KernelError` where it is no value of
    `operands`, element by element.
    """
    return elementwise(text, *operands)


def elementwise(text: str, *names: str) -> Expr:
    """An expression; `KernelError` where it is no value of operands `names`, element by element."""
    tree = parse(text)
    sums = tree.op in MASKS or any(node.op in REDUCTIONS for node in tree)
    if sums or not set(tree.leaves) <= set(names):
        every = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        raise KernelError(f"expression {text!r} is no value of {every}, element by element")
    return tree


def weighs(text: str) -> bool:
    """Whether the activation of experts has a token's weight in it: what it gives is then added up
    as it is.
    """
    return WEIGHT in activation(text, ROUTED).leaves


def has_gate(text: str) -> bool:
    """Whether the activation of experts reads the product of gate: MLPs where it does not have no
    such matrix, and up alone is activated.
    """
    return GATED[0] in activation(text, ROUTED).leaves


def leaf(name: str) -> Expr:
    """An operand."""
    return Expr(_LEAF, name=name)


def const(value: float) -> Expr:
    """A constant."""
    return Expr(_CONST, value=float(value) + 0.0)  # -0.0 is 0.0: equal values, equal texts


def apply(op: str, *args: Expr) -> Expr:
    """An operation of trees."""
    return Expr(op, args)


def substitute(tree: Expr, values: Mapping[str, Expr]) -> Expr:
    """The tree with trees in the place of its leaves; those without one stay."""
    if tree.op == _LEAF:
        return values.get(tree.name, tree)
    args = tuple(substitute(arg, values) for arg in tree.args)
    return tree if args == tree.args else Expr(tree.op, args)


def evaluate(
    tree: Expr,
    leaves: Callable[[str], T],
    functions: Mapping[str, Callable[..., T]],
    constant: Callable[[float], T],
    known: Mapping[Expr, T] | None = None,
) -> T:
    """The tree's value, operation by operation as `functions` say, arguments from the left.

    What occurs several times is computed once. `known` are values of whole subtrees.
    """
    return _Walk(leaves, functions, constant, _repeated(tree), dict(known or {})).value(tree)


@dataclass(frozen=True)
class _Walk(Generic[T]):
    """One evaluation; no closure, which would be a cycle, and keep tensors until that is found."""

    leaves: Callable[[str], T]
    functions: Mapping[str, Callable[..., T]]
    constant: Callable[[float], T]
    repeated: frozenset[Expr]
    found: dict[Expr, T]

    def value(self, node: Expr) -> T:
        if node in self.found:
            return self.found[node]
        if node.op == _LEAF:
            return self.leaves(node.name)
        if node.op == _CONST:
            return self.constant(node.value)
        result = self.functions[node.op](*[self.value(arg) for arg in node.args])
        if node in self.repeated:
            self.found[node] = result
        return result


def _repeated(tree: Expr) -> frozenset[Expr]:
    """Operations that occur more than once."""
    return frozenset(node for node, count in Counter(tree).items() if count > 1 and node.args)


def temporaries(tree: Expr) -> int:
    """How many values of operations are alive at once at most while `evaluate` runs, leaves not
    counted.
    """
    return _alive(tree) + len(_repeated(tree))


def _alive(node: Expr) -> int:
    held = most = 0
    for arg in node.args:
        most = max(most, held + _alive(arg))
        held += bool(arg.args)
    return max(most, held + bool(node.args))


# -- text ------------------------------------------------------------------------------------------


def _text(tree: Expr) -> tuple[str, int]:
    """The text of a tree, and how strongly its outermost operation binds."""
    if tree.op == _LEAF:
        return tree.name, _ATOM
    if tree.op == _CONST:
        return repr(tree.value), _ATOM
    if tree.op in _INFIX:
        sign, strength = _INFIX[tree.op]
        # what is equally strong groups from the left; comparisons do not group
        left = _within(tree.args[0], strength + (strength == 0))
        return f"{left} {sign} {_within(tree.args[1], strength + 1)}", strength
    if tree.op == "neg":
        return f"-{_within(tree.args[0], _MINUS)}", _MINUS
    return f"{tree.op}({', '.join(_text(arg)[0] for arg in tree.args)})", _ATOM


def _within(tree: Expr, least: int) -> str:
    text, strength = _text(tree)
    return text if strength >= least else f"({text})"


@lru_cache(maxsize=1024)
def parse(text: str) -> Expr:
    """The tree of a text; `KernelError` says what of it is not understood, and where."""
    if len(text) > 32 * MAX_SIZE:
        raise KernelError(f"expression: {len(text)} characters are more than {32 * MAX_SIZE}")
    return _Parser(text).whole()


class _Parser:
    """Precedence climbing over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._inside = text, 0, 0
        self._advance()

    def whole(self) -> Expr:
        """The tree of the whole text."""
        tree = self._infix(0)
        if self._token:
            raise self._error()
        return tree

    def _advance(self) -> None:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        self._start = self._at
        match = _TOKEN.match(self._text, self._at)
        self._token = self._text[self._at : self._at + 1] if match is None else match[0]
        self._number, self._name = (match[1] or "", match[2] or "") if match else ("", "")
        if match is None and self._token:
            raise self._error()
        self._at += len(self._token)

    def _error(self) -> KernelError:
        found = f"{self._token!r}" if self._token else "its end"
        return KernelError(
            f"expression {self._text!r}: {found} at character {self._start + 1} is not understood"
        )

    def _expect(self, token: str) -> None:
        if self._token != token:
            raise self._error()
        self._advance()

    def _infix(self, least: int) -> Expr:
        self._inside += 1
        if self._inside > 4 * MAX_DEPTH:
            raise KernelError(f"expression {self._text[:40]!r}...: nested too deeply")
        tree = self._factor()
        while self._token in _SIGNS and _SIGNS[self._token][1] >= least:
            op, strength = _SIGNS[self._token]
            self._advance()
            tree = apply(op, tree, self._infix(strength + 1))
        self._inside -= 1
        return tree

    def _factor(self) -> Expr:
        if self._token == "-":
            self._advance()
            if self._number:
                return const(-self._value())
            self._inside += 1
            tree = apply("neg", self._infix(_MINUS))
            self._inside -= 1
            return tree
        if self._token == "(":
            self._advance()
            tree = self._infix(0)
            self._expect(")")
            return tree
        if self._number:
            return const(self._value())
        if not self._name:
            raise self._error()
        name = self._name
        self._advance()
        if self._token != "(":
            return leaf(name)
        args = []
        while self._token in ("(", ","):
            self._advance()
            args.append(self._infix(0))
        self._expect(")")
        return apply(name, *args)

    def _value(self) -> float:
        number = float(self._number)
        self._advance()
        return number
