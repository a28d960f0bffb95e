"""An activation's expression (codegen/expr.py) as a device function of the accumulators of gate and
up and of the tokens' weights: source is written from the tree, an operation a line, and compiled in
memory.

Triton reads the source of what it compiles: that of a function made here stands in `linecache`,
where Python looks for sources without a file, so nothing is written to disk, and Triton's own disk
cache, whose keys are sources, does for it what it does for others. What operations mean is as on
the CPU (codegen/functions.py): relative errors of some 1e-7 but where a sum cancels.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from hmc.codegen.expr import ROUTED, evaluate
from hmc.codegen.expr import activation as parsed

tl: Any = None


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


def tanh(x):
    """Hyperbolic tangent: an odd polynomial below 0.625 (Cephes, tanhf), else by exp."""
    size = tl.abs(x)
    square = x * x
    inner = -5.70498872745e-3 * square + 2.06390887954e-2
    inner = inner * square - 5.37397155531e-2
    inner = inner * square + 1.33314422036e-1
    inner = (inner * square - 3.33332819422e-1) * square
    high = 1.0 - 2.0 / (tl.exp(size + size) + 1.0)
    return tl.where(size < 0.625, inner * x + x, tl.where(x < 0.0, -high, high))


def softplus(x):
    """log(1 + exp(x)), as max(x, 0) + log(1 + u) with u = exp(-|x|); what 1 + u rounds off is put
    right by a factor u / ((1 + u) - 1) (Kahan's log1p)."""
    u = tl.exp(-tl.abs(x))
    seen = (1.0 + u) - 1.0
    lost = seen == 0.0
    rest = tl.where(lost, u, tl.log(1.0 + u) * u / tl.where(lost, 1.0, seen))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + rest


def gelu(x):
    """x times the normal distribution's share below x, by the complementary error function
    (Numerical Recipes, erfc), so that nothing cancels far below zero."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (z * 0.5 + 1.0)
    power = 0.17087277 * t - 0.82215223
    power = power * t + 1.48851587
    power = power * t - 1.13520398
    power = power * t + 0.27886807
    power = power * t - 0.18628806
    power = power * t + 0.09678418
    power = power * t + 0.37409196
    power = power * t + 1.00002368
    power = power * t - 1.26551223
    beyond = t * 0.5 * tl.exp(power - z * z)
    return x * tl.where(x < 0.0, beyond, 1.0 - beyond)


_NAN = "propagate_nan=tl.PropagateNan.ALL"
_SOURCES = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "where": "tl.where({}, {}, {})",
    "minimum": f"tl.minimum({{}}, {{}}, {_NAN})",
    "maximum": f"tl.maximum({{}}, {{}}, {_NAN})",
    "relu": f"tl.maximum({{}}, 0.0, {_NAN})",
    "square": "{0} * {0}",
    "sqrt": "tl.sqrt({})",
    "rsqrt": "1.0 / tl.sqrt({})",
    "exp": "tl.exp({})",
    "sigmoid": "sigmoid({})",
    "silu": "{0} * sigmoid({0})",
    "tanh": "tanh({})",
    "softplus": "softplus({})",
    "gelu": "gelu({})",
    "gelu_tanh": "{0} * sigmoid({0} * ({0} * {0} * 0.07135481282052536 + 1.5957691216057308))",
}


@cache
def function(text: str) -> FunctionType:
    """The device function `activation(gate, up, weight)` of an expression of these; `KernelError`
    for any other."""
    lines = [f"def activation({', '.join(ROUTED)}):"]

    def line(source: str) -> Callable[..., str]:
        def write(*args: str) -> str:
            lines.append(f"    t{len(lines)} = {source.format(*args)}")
            return f"t{len(lines) - 1}"

        return write

    functions = {name: line(source) for name, source in _SOURCES.items()}
    result = evaluate(parsed(text, ROUTED), str, functions, lambda value: f"({value!r})")
    lines.append(f"    return {result}")
    name = f"<activation {text}>"
    source = "\n".join(lines) + "\n"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    found: dict[str, Any] = {}
    exec(compile(source, name, "exec"), {"__name__": __name__}, found)
    made: FunctionType = found["activation"]
    return made
