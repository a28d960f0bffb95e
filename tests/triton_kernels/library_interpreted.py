"""Kernels of codegen/triton/library.py in Triton's interpreter."""

from __future__ import annotations

from functools import cache
from typing import Any

import interpreted

from hmc.codegen.triton import library
from hmc.codegen.triton.layout import Layout


@cache
def kernels() -> Any:
    """As `library.kernels`."""
    return library.made(interpreted._Kernel)


@cache
def latent_kernels(layout: Layout) -> Any:
    """As `library.latent_kernels`."""
    return library.latent_made(interpreted.kernels(layout), interpreted._Kernel)
