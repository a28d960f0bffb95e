"""Kernels made of plain functions by any compiler, Triton's `jit` or its interpreter in tests: here
those for one weight layout and one activation, in library.py all others.

Device functions and kernels call each other by name and read constants. Here they are copied into a
namespace of their own, where the names are those of one layout: so there is one kernel for any
format, and no kernel carries what all of its functions would only hand on. Triton's disk cache sees
these constants and the sources of all functions called.
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

from hmc.codegen.expr import SWIGLU
from hmc.codegen.triton import activation, experts, linear, planes, sums, terms
from hmc.codegen.triton.compiling import jit
from hmc.codegen.triton.layout import STEP, Layout
from hmc.errors import UnsupportedError

Wrap = Callable[[FunctionType], Any]

MODULES = (planes, sums, activation, linear, experts, terms)

_WORDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_EIGHT_BITS = {"E4M3": 1, "E5M2": 2, "E8M0": 3}
_UNITS = {8: "uint8", 16: "uint16", 32: "uint32"}


@cache
def kernels(layout: Layout, act: str = SWIGLU, eights: bool = False) -> Any:
    """The namespace of a layout's kernels, compiled when they are launched: `.linear[grid](...)`;
    with `eights` those that take x as two E4M3 numbers.

    Raises ImportError where there is no Triton.
    """
    return made(layout, act, eights, jit, importlib.import_module("triton.language").constexpr)


def made(
    layout: Layout, act: str, eights: bool, wrap: Wrap, constant: Callable[[Any], Any]
) -> ModuleType:
    """A module of the functions, each wrapped; constants too. `UnsupportedError` for `eights` of
    codes that tensor cores cannot multiply as they are."""
    if eights and layout.kind != "e4m3":
        raise UnsupportedError("products of x as two FP8 numbers are with FP8 E4M3")
    constants = _constants(layout, eights, importlib.import_module("triton.language"))
    known = {name: constant(value) for name, value in constants.items()}
    return joined((*functions(MODULES), activation.function(act)), known, wrap)


def joined(each: Iterable[FunctionType], known: Mapping[str, Any], wrap: Wrap) -> ModuleType:
    """A module of copies of functions, each wrapped, that see each other and what is `known`."""
    home = ModuleType("hmc_triton")
    names = home.__dict__
    names.update(known, __builtins__=builtins, tl=importlib.import_module("triton.language"))
    for function in each:
        copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        copy.__annotations__ = function.__annotations__
        copy.__module__ = function.__module__
        names[function.__name__] = wrap(copy)
    return home


@cache
def functions(modules: tuple[ModuleType, ...]) -> tuple[FunctionType, ...]:
    """All device functions and kernels of some modules."""
    return tuple(
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, FunctionType) and each.__module__ == module.__name__
    )


def _constants(layout: Layout, eights: bool, tl: Any) -> dict[str, Any]:
    scales = [_WORDS.get(scale.kind, "uint8") for scale in layout.scales]
    words = (_WORDS.get(layout.kind, _UNITS[layout.unit]), *scales)
    width, halves = layout.unit, []
    while width > layout.bits:
        width //= 2
        halves.append(width)
    return {
        "BITS": layout.bits,
        "PACKED": layout.packed,
        "HALVES": tuple(halves),
        "KIND": layout.kind,
        "FIRST": layout.values[0] if layout.kind == "line" else 0.0,
        "TERMS": layout.terms,
        "POWER": 1.0 if eights else layout.power,
        "EIGHTS": eights,
        "BLOCK": STEP,
        **_EIGHT_BITS,
        "SCALES": tuple(_EIGHT_BITS.get(scale.kind.upper(), 0) for scale in layout.scales),
        "ZEROS": tuple(scale.zero for scale in layout.scales),
        "HIGH": tuple(scale.rows for scale in layout.scales),
        "WIDE": tuple(scale.columns for scale in layout.scales),
        "EACH": eights or layout.by_step,
        "SCALED": not (eights or layout.by_step) and (bool(layout.scales) or layout.power != 1.0),
        "TYPES": tuple(tl.pointer_type(getattr(tl, word)) for word in words),
        "BAND": linear.BAND,
    }
