"""Compiles many kernels into the disk cache, in several processes: `python -m hmc.codegen.build <
specs.json`.

llvmlite serialises every call of LLVM in one process, so a first start would otherwise use one
core.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable

from hmc import env
from hmc.codegen.jit import Jit, cached_object
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError

_FEW = 4
"""Fewer missing kernels than this are left to the caller: starting a process costs as much."""


def build(
    specs: Iterable[KernelSpec], progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Fill the cache with those of `specs` that it lacks, one process a core.

    `progress(what, done, total)` counts kernels. Raises `KernelError` with the first line of what
    went wrong.
    """
    missing = [spec for spec in dict.fromkeys(specs) if not cached_object(spec).is_file()]
    if len(missing) < _FEW or env.debug_level() >= 5 or env.dump_dir() is not None:
        return
    workers = min(env.threads(), len(missing))
    command = [sys.executable, "-m", "hmc.codegen.build"]
    children = []
    for number in range(workers):
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert child.stdin is not None
        child.stdin.write(_to_json(missing[number::workers]).encode())
        child.stdin.close()
        children.append(child)
    try:
        for child in children:
            while True:
                try:
                    child.wait(timeout=0.25)
                    break
                except subprocess.TimeoutExpired:
                    _report(missing, progress)
            if child.returncode:
                assert child.stderr is not None
                lines = child.stderr.read().decode().strip().splitlines() or ["no message"]
                raise KernelError(f"building kernels failed: {lines[-1]}")
    finally:
        for child in children:
            child.kill()
            child.wait()
            assert child.stderr is not None
            child.stderr.close()
    _report(missing, progress)


def _report(specs: list[KernelSpec], progress: Callable[[str, int, int], None] | None) -> None:
    if progress is not None:
        done = sum(cached_object(spec).is_file() for spec in specs)
        progress("compiling kernels", done, len(specs))


def _to_json(specs: list[KernelSpec]) -> str:
    return json.dumps([[s.op, s.isa, s.weight, s.out, s.params, s.tile] for s in specs])


def _from_json(text: str) -> list[KernelSpec]:
    return [
        KernelSpec(op, isa, weight, out, _pairs(params), _pairs(tile))
        for op, isa, weight, out, params, tile in json.loads(text)
    ]


def _pairs(items: list[list[object]]) -> tuple[tuple[str, int], ...]:
    return tuple((str(name), int(str(value))) for name, value in items)


if __name__ == "__main__":
    _jit = Jit(EMITTERS)
    for _spec in _from_json(sys.stdin.read()):
        _jit.object_code(_spec)
