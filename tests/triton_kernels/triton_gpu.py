"""A GPU that Triton compiles for and that is not there: launches of kernels of codegen/triton go to
where its driver would be. On tensors of the meta device they have their true sizes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partialmethod
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402

from hmc.codegen.triton.compiling import make_ready  # noqa: E402
from hmc.runtime.device_ops.triton import attention, launch  # noqa: E402

_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
_NUMBERS = count(1000)
"""Of devices: kernels are kept by device."""
_TARGET = re.compile(r"\.target (\w+)")


class _Driver:
    """Of a GPU that no kernel has been made for; what Triton asks before it launches."""

    def __init__(self, arch: int) -> None:
        self._arch, self.number = arch, next(_NUMBERS)

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Played:
    """What was compiled, by the kernel's name: each variant of a kernel once. Loading is noted."""

    compiled: dict[str, list[Any]] = field(default_factory=dict)
    loaded: list[Any] = field(default_factory=list)
    launches: int = 0


@contextmanager
def gpu(arch: int, processors: int = 128, *, compiles: bool = True) -> Iterator[Played]:
    """A GPU of compute capability `arch`. Unless it `compiles`, what would be compiled is noted,
    and something else that does nothing is launched."""
    played, driver = Played(), _Driver(arch)

    def asked(*, key: str, fn: Any, **_: Any) -> bool:
        played.compiled.setdefault(fn.name.split(".")[-1], []).append(key)
        nothing = Mock(spec_set=("run", "launch_metadata", "function", "packed_metadata"))
        fn.jit_function.device_caches[driver.number][0][key] = nothing
        return True

    def made(*, key: str, fn: Any, **_: Any) -> None:
        kernel = fn.jit_function.device_caches[driver.number][0][key]
        played.compiled.setdefault(fn.name.split(".")[-1], []).append(kernel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        hook, does = ("jit_post_compile_hook", made) if compiles else ("jit_cache_hook", asked)
        patch.setattr(triton.knobs.runtime, hook, does)
        patch.setattr(CompiledKernel, "_init_handles", partialmethod(_load, played))
        for module in (launch, attention):
            patch.setattr(module, "arch", lambda device: arch)
            patch.setattr(module, "processors", lambda device: processors)
        yield played


def _load(kernel: Any, played: Played) -> None:
    def launch(*args: Any) -> None:
        played.launches += 1

    if kernel.module is None:
        kernel.module, kernel._run = played, launch
        played.loaded.append(kernel)


@dataclass(frozen=True)
class Assembled:
    """What came of a kernel: registers and spilled bytes of a thread, bytes of shared memory of a
    program, and the tensor cores' instruction ("" for none)."""

    registers: int
    spilled: int
    shared: int
    instruction: str


def assembled(arch: int, launches: Callable[[], object]) -> dict[str, Assembled]:
    """By name, the kernels that are launched, as the assembler of the architecture sees them."""
    with gpu(arch) as played:
        make_ready(launches)
    return {name: _assembled(arch, made[-1]) for name, made in played.compiled.items()}


def _assembled(arch: int, kernel: Any) -> Assembled:
    ptx, nvidia = kernel.asm["ptx"], triton.knobs.nvidia
    tool = nvidia.ptxas if arch < 100 else getattr(nvidia, "ptxas_blackwell", nvidia.ptxas)
    target = _TARGET.search(ptx)
    assert target is not None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={target[1]}", str(path), "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", told)
    spilled = re.search(r"(\d+) bytes spill stores", told)
    assert registers is not None and spilled is not None
    cores = next((each for each in _INSTRUCTIONS if each in ptx), "")
    return Assembled(int(registers[1]), int(spilled[1]), kernel.metadata.shared, cores)
