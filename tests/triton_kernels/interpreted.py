"""Kernels of codegen/triton in Triton's interpreter, in this process and beside compiled ones.

Triton decides between compiler and interpreter where a function is wrapped, for its own library
when it is imported. So its functions that kernels call are interpreted only while a kernel runs,
and so are bf16 products and roundings, which the interpreter gets wrong: the former are of raw
16-bit words, the latter towards zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from hmc.codegen.expr import SWIGLU  # noqa: E402
from hmc.codegen.triton import build  # noqa: E402
from hmc.codegen.triton.layout import Layout  # noqa: E402

_LIBRARY = {name: InterpretedFunction(getattr(tl, name).fn) for name in ("cumsum", "max", "sum")}
_dot = interpreter.InterpreterBuilder.create_dot
_convert = interpreter._convert_float


def _wide(handle: Any) -> Any:
    if not handle.dtype.scalar.is_bf16():
        return handle
    return interpreter.TensorHandle(_f32(handle.data), tl.float32)


def _f32(words: Any) -> Any:
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _create_dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
    return _dot(self, _wide(a), _wide(b), d, *more)


def _convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The interpreter cuts, and carries of its own rounding are lost."""
    if target == tl.bfloat16 and source in (tl.float32, tl.float16):
        bits = data.astype(np.float32).view(np.uint32)
        near = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, near).astype(np.uint16)
    if target == tl.float8e4nv and source == tl.float32:
        eights = torch.from_numpy(data.copy()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return eights.view(torch.uint8).numpy()
    return _convert(data, source, target, rounding)


_LANGUAGE = (tl, tl.core, tl.math, tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base)
"""What the interpreter puts its own functions into. Where kernels call others it leaves them there,
and nothing could be compiled afterwards."""


@contextmanager
def _as_it_was() -> Iterator[None]:
    before = [dict(vars(owner)) for owner in _LANGUAGE]
    try:
        yield
    finally:
        for owner, names in zip(_LANGUAGE, before, strict=True):
            for name, value in vars(owner).copy().items():
                if name not in names:
                    delattr(owner, name)
                elif value is not names[name]:
                    setattr(owner, name, names[name])


@contextmanager
def _interpreting() -> Iterator[None]:
    with _as_it_was(), pytest.MonkeyPatch.context() as patch:
        for name, function in _LIBRARY.items():
            patch.setattr(tl, name, function)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
        patch.setattr(interpreter, "_convert_float", _convert_float)
        # exp of a large number, NaN; and older interpreters take elements of arrays for numbers
        with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield


class _Kernel:
    """`kernel[grid](...)`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = InterpretedFunction(function)
        self.fn = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            with _interpreting():
                self._function[grid](*args, **options)

        return launch


@cache
def kernels(layout: Layout, act: str = SWIGLU, eights: bool = False) -> Any:
    """As `build.kernels`."""
    return build.made(layout, act, eights, _Kernel, lambda value: value)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, of norms."""
    difference = (found.double() - exact.double()).norm() / exact.double().norm()
    return float(difference)
