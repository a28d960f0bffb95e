"""Kernels compiled for GPUs that are not there, as a launch would compile them: the launch is made
on the CPU, and what it hands to Triton is compiled for each architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.compiler import compile as compile_source  # noqa: E402

from hmc.codegen.triton import library, table  # noqa: E402
from hmc.codegen.triton.table import Compiled  # noqa: E402
from hmc.runtime.device_ops.triton import attention  # noqa: E402

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
          torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.uint16: "*u16",
          torch.uint32: "*u32"}  # fmt: skip
_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass
class Launches:
    """What launches hand over, compiled for `arch` and not run."""

    arch: int
    found: dict[str, Compiled] = field(default_factory=dict)

    def launch(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Compile what `kernel[grid](*args, **options)` would."""
        signature: dict[str, Any] = {}
        fixed: dict[tuple[int, ...], Any] = {}
        whole: dict[tuple[int, ...], Any] = {}
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False)) | options
        flags = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
        for at, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
            value = given[name]
            if parameter.is_constexpr:
                signature[name], fixed[at,] = "constexpr", value
            elif isinstance(value, tuple):
                signature[name] = tuple(_type(each) for each in value)
                whole.update({(at, i): _whole(each) for i, each in enumerate(value)})
            else:
                signature[name] = _type(value)
                if not parameter.do_not_specialize:
                    whole[at,] = _whole(value)
        whole = {at: attributes for at, attributes in whole.items() if attributes}
        source = ASTSource(kernel, signature, fixed, whole)
        made = compile_source(source, target=GPUTarget("cuda", self.arch, 32), options=flags)
        ptx = made.asm["ptx"]
        cores = next((each for each in _INSTRUCTIONS if each in ptx), "")
        registers, spilled = table._assembled(ptx, self.arch)
        name = kernel.fn.__name__
        self.found[name] = Compiled(registers, spilled, made.metadata.shared, cores)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _whole(value: Any) -> Any:
    if isinstance(value, float) or (isinstance(value, int) and value % 16):
        return None
    return [["tt.divisibility", 16]]


class _Kernel:
    def __init__(self, launches: Launches, kernel: Any) -> None:
        self._launches, self._kernel = launches, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self._launches.launch(self._kernel, args, options)


class _Kernels:
    def __init__(self, launches: Launches, kernels: Any) -> None:
        self._launches, self._kernels = launches, kernels

    def __getattr__(self, name: str) -> _Kernel:
        return _Kernel(self._launches, getattr(self._kernels, name))


@contextmanager
def compiling(arch: int) -> Iterator[Launches]:
    """Launches inside are compiled for `arch`."""
    launches = Launches(arch)
    plain, latent = library._kernels(), library._latent_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "kernels", lambda: _Kernels(launches, plain))
        patch.setattr(library, "latent_kernels", lambda layout: _Kernels(launches, latent(layout)))
        patch.setattr(attention, "_arch", lambda device: arch)
        patch.setattr(attention, "_processors", lambda device: 128)
        yield launches
