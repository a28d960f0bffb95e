"""What the operations of expressions (expr.py) mean on vectors of f32, in every tier.

Relative errors are a few 1e-7 but where a sum cancels. NaN stays NaN. Results of a lane depend on
that lane alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from llvmlite import ir

from hmc.codegen import expr
from hmc.codegen.expr import Expr
from hmc.codegen.ir import F32, I32, Emitter, Value, vec
from hmc.codegen.vector import exp, fsplat, isplat, polynomial, sigmoid

Function = Callable[..., Value]


def emit(
    e: Emitter,
    tree: Expr,
    leaves: Callable[[str], Value],
    lanes: int,
    known: Mapping[Expr, Value] | None = None,
) -> Value:
    """`tree` on vectors of `lanes` f32; `known` are values of subtrees, reductions among them."""
    table = {op: partial(function, e) for op, function in FUNCTIONS.items()}
    return expr.evaluate(tree, leaves, table, lambda value: fsplat(value, lanes), known)


def _like(x: Value, value: float) -> ir.Constant:
    return fsplat(value, x.type.count)


def _named(name: str) -> Function:
    """An LLVM intrinsic of vectors."""

    def call(e: Emitter, *args: Value) -> Value:
        return e.call(f"llvm.{name}.v{args[0].type.count}f32", args[0].type, *args)

    return call


sqrt, minimum, maximum, absolute, _with_sign = map(
    _named, ("sqrt", "minimum", "maximum", "fabs", "copysign")
)


def tanh(e: Emitter, x: Value) -> Value:
    """Hyperbolic tangent: an odd polynomial below 0.625 (Cephes, tanhf), else by exp."""
    b, size = e.b, absolute(e, x)
    square = b.fmul(x, x)
    factors = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1)
    inner = b.fmul(polynomial(e, square, *factors, -3.33332819422e-1), square)
    low = e.fma(inner, x, x)
    both = b.fadd(exp(e, b.fadd(size, size)), _like(x, 1.0))
    high = b.fsub(_like(x, 1.0), b.fdiv(_like(x, 2.0), both))
    small = b.fcmp_ordered("<", size, _like(x, 0.625))
    return b.select(small, low, _with_sign(e, high, x))


def log(e: Emitter, x: Value) -> Value:
    """Natural logarithm of finite, normal x > 0 (Cephes, logf)."""
    b, count = e.b, x.type.count
    words = vec(I32, count)
    # x = m 2^n with sqrt(1/2) <= m < sqrt(2)
    bits = b.sub(b.bitcast(x, words), isplat(0x3F3504F3, count))
    n = b.ashr(bits, isplat(23, count))
    rest = b.add(b.and_(bits, isplat(0x7FFFFF, count)), isplat(0x3F3504F3, count))
    f = b.fsub(b.bitcast(rest, x.type), _like(x, 1.0))
    power = b.sitofp(n, vec(F32, count))
    factors = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1)
    more = (1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
    square = b.fmul(f, f)
    result = b.fmul(b.fmul(polynomial(e, f, *factors, *more), f), square)
    result = e.fma(power, _like(x, -2.12194440e-4), result)
    result = b.fadd(e.fma(square, _like(x, -0.5), result), f)
    return e.fma(power, _like(x, 0.693359375), result)


def softplus(e: Emitter, x: Value) -> Value:
    """log(1 + exp(x)), as max(x, 0) + log(1 + u) with u = exp(-|x|).

    What 1 + u rounds off is put right by a factor u / ((1 + u) - 1) (Kahan's log1p).
    """
    b = e.b
    one = _like(x, 1.0)
    u = exp(e, b.fneg(absolute(e, x)))
    whole = b.fadd(one, u)
    seen = b.fsub(whole, one)
    lost = b.fcmp_ordered("==", seen, _like(x, 0.0))
    scaled = b.fdiv(b.fmul(log(e, whole), u), b.select(lost, one, seen))
    rest = b.select(lost, u, scaled)
    return b.fadd(maximum(e, x, _like(x, 0.0)), rest)


_ERFC = (
    *(0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418),
    *(0.37409196, 1.00002368, -1.26551223),
)
"""Numerical Recipes, erfc: with t = 1 / (1 + z / 2) the exponent is -z^2 plus this polynomial in t;
relative error 1.2e-7 for all z >= 0."""


def gelu(e: Emitter, x: Value) -> Value:
    """x times the normal distribution's share below x, by the complementary error function, so that
    nothing cancels far below zero.
    """
    b = e.b
    z = b.fmul(absolute(e, x), _like(x, math.sqrt(0.5)))
    t = b.fdiv(_like(x, 1.0), e.fma(z, _like(x, 0.5), _like(x, 1.0)))
    power = e.fma(b.fneg(z), z, polynomial(e, t, *_ERFC))
    beyond = b.fmul(b.fmul(t, _like(x, 0.5)), exp(e, power))
    below = b.fcmp_ordered("<", x, _like(x, 0.0))
    return b.fmul(x, b.select(below, beyond, b.fsub(_like(x, 1.0), beyond)))


def gelu_tanh(e: Emitter, x: Value) -> Value:
    """x (1 + tanh(u)) / 2 = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    b = e.b
    square = b.fmul(x, x)
    factor = 2 * math.sqrt(2 / math.pi)
    twice = b.fmul(x, polynomial(e, square, 0.044715 * factor, factor))
    return b.fmul(x, sigmoid(e, twice))


FUNCTIONS: Final[dict[str, Function]] = {
    "add": lambda e, x, y: e.b.fadd(x, y),
    "sub": lambda e, x, y: e.b.fsub(x, y),
    "mul": lambda e, x, y: e.b.fmul(x, y),
    "div": lambda e, x, y: e.b.fdiv(x, y),
    "neg": lambda e, x: e.b.fneg(x),
    "less": lambda e, x, y: e.b.fcmp_ordered("<", x, y),
    "less_equal": lambda e, x, y: e.b.fcmp_ordered("<=", x, y),
    "where": lambda e, mask, x, y: e.b.select(mask, x, y),
    "minimum": minimum,
    "maximum": maximum,
    "relu": lambda e, x: maximum(e, x, _like(x, 0.0)),
    "square": lambda e, x: e.b.fmul(x, x),
    "sqrt": sqrt,
    "rsqrt": lambda e, x: e.b.fdiv(_like(x, 1.0), sqrt(e, x)),
    "exp": exp,
    "sigmoid": sigmoid,
    "silu": lambda e, x: e.b.fmul(x, sigmoid(e, x)),
    "tanh": tanh,
    "softplus": softplus,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
"""Every operation but reductions, which are loops of the kernel that has the row."""
