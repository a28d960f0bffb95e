"""What the stream sanitizer is told that kernels write is what they write."""

from __future__ import annotations

import inspect
import re
from types import FunctionType

import pytest

pytest.importorskip("triton")

from gpu.fake.launches import TABLE, WRITTEN

from hmc.codegen.triton import build, latent, library

KERNELS: dict[str, FunctionType] = {
    each.__name__: each
    for each in build.functions((*build.MODULES, *library.MODULES, latent))
    if "tl.program_id" in inspect.getsource(each)
}


def test_every_kernel_is_known() -> None:
    assert KERNELS.keys() == WRITTEN.keys()
    held = {name for name, each in KERNELS.items() if TABLE in inspect.signature(each).parameters}
    assert held == {"experts_act", "experts_down", "experts_down_few"}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_it_stores_is_told(name: str) -> None:
    """Addresses are made of arguments, in several steps."""
    kernel = KERNELS[name]
    arguments, source = inspect.signature(kernel).parameters, inspect.getsource(kernel)
    assert set(WRITTEN[name]) <= arguments.keys()
    made = dict(re.findall(r"^ +(\w+) = (?:tl\.\w+\()?(.*)$", source, re.MULTILINE))
    for stored in re.findall(r"tl\.(?:store|atomic_add)\((\w+)", source):
        while stored not in arguments:
            stored = next(iter(re.findall(r"[a-z_]\w*", made[stored])))
        assert stored in WRITTEN[name]
