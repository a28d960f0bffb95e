"""Kernels of attention, rows and routing, made of plain functions by any compiler: Triton's `jit`,
or its interpreter in tests. Like build.py, whose kernels are made once for each weight layout; all
but those of latent attention's kv_b read no stored matrix, and are made once.
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Mapping
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

from hmc.codegen.triton import attend, attend_prompt, build, latent, route, rows, sort
from hmc.codegen.triton.build import Wrap
from hmc.codegen.triton.layout import Layout

MODULES = (attend, attend_prompt, rows, route, sort)
"""Of kernels that read no stored matrix."""
ANY_NUMBER = (*build.ANY_NUMBER, "past", "before", "splits", "table_stride", "slots", "chunks")
"""Arguments that kernels are not compiled anew for: those that vary from call to call."""


def kernels() -> Any:
    """The namespace of the kernels of `MODULES`, compiled when they are launched:
    `.attend[grid](...)`. Raises ImportError where there is no Triton."""
    return _kernels()


def latent_kernels(layout: Layout) -> Any:
    """The same of latent.py, for a kv_b of this layout."""
    return _latent_kernels(layout)


@cache
def _kernels() -> Any:
    return made(MODULES, {}, _jit)


@cache
def _latent_kernels(layout: Layout) -> Any:
    return made((latent,), vars(build.kernels(layout)), _jit)


def made(modules: tuple[ModuleType, ...], known: Mapping[str, Any], wrap: Wrap) -> ModuleType:
    """A module of the functions of others, each wrapped, that see each other and what is
    `known`."""
    home = ModuleType("hmc_triton_" + "_".join(each.__name__.split(".")[-1] for each in modules))
    names = home.__dict__
    names.update(known, __builtins__=builtins, tl=importlib.import_module("triton.language"))
    for module in modules:
        for function in list(vars(module).values()):
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                copy = FunctionType(
                    function.__code__, names, function.__name__, function.__defaults__
                )
                copy.__annotations__ = function.__annotations__
                copy.__module__ = function.__module__
                names[function.__name__] = wrap(copy)
    return home


def _jit(function: FunctionType) -> Any:
    return importlib.import_module("triton").jit(function, do_not_specialize=ANY_NUMBER)
