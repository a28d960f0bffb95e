"""Kernels compiled ahead of time: no spills, shared memory fits, products are tensor cores'."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from hmc.codegen.triton import table
from hmc.codegen.triton.layout import Layout
from hmc.formats import FORMATS, format_of

LAYOUTS = {
    "fp8": Layout.of(format_of("fp8"), ("F8_E4M3", "F32")),
    "bf16": Layout.of(format_of("bf16"), ("BF16",)),
    "fp16": Layout.of(format_of("fp16"), ("F16",)),
    "f32": Layout.of(format_of("f32"), ("F32",)),
    "int4": Layout.of(format_of("int4"), ("I32", "BF16"), 32),
    "int4 of 128": Layout.of(format_of("int4"), ("I32", "F32"), 128),
}
DENSE = {"rows": 4096, "columns": 7168}
UP = {"rows": 2048, "columns": 7168, "experts": 256, "top_k": 8}
DOWN = {"rows": 7168, "columns": 2048, "experts": 256, "top_k": 8, "all_experts": 256}


def check(
    name: str, form: str, arch: int, tokens: int, eights: bool = False, bias: str = ""
) -> None:
    """Of the kernel that a launch on `arch` takes for `tokens`."""
    pair, layout = name == "pair", LAYOUTS[form]
    kernel, sizes, more = name, DENSE, dict[str, Any]()
    if name in ("linear", "pair"):
        kernel, more = "linear", {"PAIR": pair, "SPLIT": tokens <= table.FEW, "BIAS": not pair}
    else:
        sizes = UP if name == "experts_act" else DOWN
        more = {"EXPERTS": 256, "WIDTH": 3 * layout.planes, "BIAS": bias, "WEIGHED": False}
        more |= {"ADDS": True} if name == "experts_down_few" else {}
    tile = table.tile(name, arch, tokens, eights)
    made = table.compile(kernel, layout, sizes, arch, tile, eights=eights, **more)
    assert made.spilled == 0
    assert made.shared <= table.SHARED[arch] * 1024
    assert made.instruction


@pytest.mark.parametrize(
    ("name", "form", "arch", "tokens"),
    [
        ("linear", "fp8", 80, 4096),
        ("linear", "int4", 80, 1),
        ("experts_act", "fp8", 120, 64),
        ("experts_down_few", "int4", 120, 1),
    ],
)
def test_some_kernels(name: str, form: str, arch: int, tokens: int) -> None:
    check(name, form, arch, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts_act", "experts_down", "experts_down_few"])
def test_experts_with_biases(name: str) -> None:
    check(name, "bf16", 90, 1, bias="bf16")
    check(name, "fp8", 120, 128, bias="f32")


TILES = [("linear", 1), ("linear", 128), ("linear", 4096), ("pair", 1), ("pair", 128),
         ("experts_act", 1), ("experts_act", 128), ("experts_down", 1), ("experts_down", 128),
         ("experts_down_few", 1)]  # fmt: skip
"""Kernels, and tokens for each of their tiles."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", table.SHARED)
@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize(("name", "tokens"), TILES)
def test_every_kernel_everywhere(name: str, tokens: int, form: str, arch: int) -> None:
    if form in ("fp16", "f32", "int4 of 128") and arch not in (80, 100):
        pytest.skip("compiled for the first and the oddest alone")
    check(name, form, arch, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), [("terms", 89), ("terms", 120), ("bounds", 80)])
def test_kernels_that_multiply_nothing(name: str, arch: int) -> None:
    tile = table.Tile(64, table.TERMS, 128, 4, 3)
    constants = {"BLOCK": table.BOUNDS} if name == "bounds" else {}
    layout = LAYOUTS["fp8"]
    made = table.compile(name, layout, DENSE, arch, tile, eights=name == "terms", **constants)
    assert made.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in table.SHARED if arch >= 89])
@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("name", ["linear", "pair", "experts_act", "experts_down"])
def test_products_of_two_fp8_numbers(name: str, tokens: int, arch: int) -> None:
    check(name, "fp8", arch, tokens, eights=True)


def test_every_format_has_a_layout() -> None:
    assert {form.split()[0] for form in LAYOUTS} == set(FORMATS)
