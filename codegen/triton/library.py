"""Kernels of attention, rows and routing, by any compiler like those of build.py. All but those of
latent attention's kv_b read no stored matrix, and are made once.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

from hmc.codegen.triton import attend, attend_prompt, latent, route, rows, sort
from hmc.codegen.triton.build import Wrap, functions, joined
from hmc.codegen.triton.build import kernels as of_layout
from hmc.codegen.triton.compiling import jit
from hmc.codegen.triton.layout import Layout

MODULES = (attend, attend_prompt, rows, route, sort)
"""Of kernels that read no stored matrix."""


@cache
def kernels() -> Any:
    """The namespace of the kernels of `MODULES`, compiled when they are launched:
    `.attend[grid](...)`. Raises ImportError where there is no Triton."""
    return made(jit)


@cache
def latent_kernels(layout: Layout) -> Any:
    """The same of latent.py, for a kv_b of this layout."""
    return latent_made(of_layout(layout), jit)


def made(wrap: Wrap) -> ModuleType:
    """A module of the functions of `MODULES`, each wrapped."""
    return joined(functions(MODULES), {}, wrap)


def latent_made(of_planes: Any, wrap: Wrap) -> ModuleType:
    """A module of those of latent.py, which see what is `of_planes` of a layout."""
    return joined(functions((latent,)), vars(of_planes), wrap)
