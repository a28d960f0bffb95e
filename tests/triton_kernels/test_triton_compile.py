"""Kernels of products compiled for GPUs that are not there, as launches ask for them: no spills,
shared memory fits, products are tensor cores'."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from format_rows import TWICE
from triton_gpu import assembled

from hmc.codegen.triton import table
from hmc.codegen.triton.layout import Layout
from hmc.errors import UnsupportedError
from hmc.formats import FORMATS, format_of, forms, registered
from hmc.runtime.device_ops.triton import launch
from hmc.runtime.device_ops.triton.launch import Terms, Weight, Workspace, X
from hmc.runtime.weights.torch_view import TORCH

META = torch.device("meta")
WORK = Workspace(META)
EXPERTS, TOP_K = 256, 8
NO_PRODUCTS = ("terms", "bounds")


@dataclass(frozen=True)
class Stored:
    """A format, and how its planes are stored."""

    name: str
    dtypes: tuple[str, ...]
    group: int = 0

    def weight(self, rows: int, columns: int) -> Weight:
        row = format_of(self.name)
        planes = [
            torch.empty(form.shape, dtype=TORCH[form.kept], device=META)
            for form in forms(row, (rows, columns), self.group, self.dtypes)
        ]
        return Weight.of(planes, self.name, (rows, columns), self.group)


FORMS = {
    "fp8": Stored("fp8", ("F8_E4M3", "F32")),
    "bf16": Stored("bf16", ("BF16",)),
    "fp16": Stored("fp16", ("F16",)),
    "f32": Stored("f32", ("F32",)),
    "int4": Stored("int4", ("I32", "BF16"), 32),
    "int4 of 128": Stored("int4", ("I32", "F32"), 128),
    "int4-zero": Stored("int4-zero", ("I32", "BF16", "I32"), 128),
    "int8": Stored("int8", ("I8", "F32")),
    "int8-zero": Stored("int8-zero", ("I8", "BF16", "I8"), 128),
    "mxfp4": Stored("mxfp4", ("U8", "U8")),
    "nvfp4": Stored("nvfp4", ("U8", "F8_E4M3", "F32")),
}


def linear(form: Stored, tokens: int, eights: bool, pair: bool = False) -> None:
    w = form.weight(4096, 7168)
    x: X = torch.empty(tokens, w.columns, dtype=torch.bfloat16, device=META)
    x = Terms.of(x, w.layout) if eights else x
    if pair:
        launch.gate_up(x, w, w, WORK)
    else:
        launch.matmul(x, w, WORK, bias=torch.empty(w.rows, device=META))


def experts(form: Stored, tokens: int, eights: bool, bias: bool = False) -> None:
    gate, down = form.weight(2048, 7168), form.weight(7168, 2048)
    sizes = (gate.rows, gate.rows, down.rows) if bias else ()
    own = tuple(torch.empty(n, dtype=torch.bfloat16, device=META) for n in sizes)
    held = launch.Experts.of((number, (gate, gate, down), own) for number in range(EXPERTS))
    slots = torch.empty(tokens * TOP_K, dtype=torch.int64, device=META)
    edges = torch.empty(EXPERTS + 1, dtype=torch.int64, device=META)
    launch.experts(
        torch.empty(tokens, 7168, dtype=torch.bfloat16, device=META), slots, edges,
        torch.empty(len(slots), device=META), held, WORK, torch.empty(tokens, 7168, device=META),
        top_k=TOP_K, adds=True, eights=eights,
    )  # fmt: skip


LAUNCHES = {"linear": linear, "pair": partial(linear, pair=True), "experts": experts,
            "biased": partial(experts, bias=True)}  # fmt: skip
SIZES = [("linear", 1), ("linear", 128), ("linear", 4096), ("pair", 1), ("pair", 128),
         ("experts", 1), ("experts", 64), ("experts", 4096)]  # fmt: skip
"""Launches, and tokens for each of their tiles."""


def check(name: str, form: str, arch: int, tokens: int, eights: bool = False) -> None:
    found = assembled(arch, lambda: LAUNCHES[name](FORMS[form], tokens, eights))
    assert found
    for kernel, made in found.items():
        assert made.spilled == 0, kernel
        assert made.shared <= table.SHARED[arch] * 1024, kernel
        assert made.instruction or kernel in NO_PRODUCTS, kernel


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "form", "arch", "tokens"),
    [("linear", "fp8", 80, 4096), ("linear", "int4", 80, 1), ("experts", "fp8", 120, 4096),
     ("experts", "int4", 120, 1)],
)  # fmt: skip
def test_some_kernels(name: str, form: str, arch: int, tokens: int) -> None:
    check(name, form, arch, tokens)


def thirds(*choices: Iterable[object]) -> list[tuple[object, ...]]:
    """A third of all combinations of what may be chosen, such that any two choices of different
    kinds (a kernel and a card, a format and a card, a kernel and a format) meet in some: all would
    take hours, and a kernel that spills does so on several cards or for several formats.
    """
    numbered = [list(enumerate(each)) for each in choices]
    return [
        tuple(value for _, value in each)
        for each in product(*numbered)
        if sum(number for number, _ in each) % 3 == 0
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "form", "arch"),
    thirds((1, 64, 4096), ("fp8", "bf16", "mxfp4", "nvfp4", "int4-zero"), table.SHARED),
)
def test_experts_with_biases(tokens: int, form: str, arch: int) -> None:
    check("biased", form, arch, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "form", "arch"), thirds(SIZES, FORMS, table.SHARED))
def test_every_kernel_everywhere(size: tuple[str, int], form: str, arch: int) -> None:
    check(size[0], form, arch, size[1])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in table.SHARED if arch >= 89])
@pytest.mark.parametrize(("name", "tokens"), SIZES)
def test_products_of_two_fp8_numbers(name: str, tokens: int, arch: int) -> None:
    check(name, "fp8", arch, tokens, eights=True)


def test_a_format_of_two_planes_of_scales() -> None:
    with registered(TWICE):
        form = Stored(TWICE.name, ("F8_E4M3", "BF16", "F32"))
        for tokens in (1, 4096):
            (made,) = assembled(80, partial(linear, form, tokens, False)).values()
            assert made.spilled <= 16 and made.instruction


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read_or_refused(name: str) -> None:
    row = format_of(name)
    dtypes = [plane.in_memory(plane.dtypes[0]) for plane in row.planes]
    known = all(plane.kind != "order" and not plane.block[1] for plane in row.planes)
    if known and row.code_bits <= 32:
        assert Layout.of(row, dtypes, 32 * row.grouped).planes == len(row.planes)
        return
    with pytest.raises(UnsupportedError, match=name):
        Layout.of(row, dtypes, 32 * row.grouped)


def test_kernels_of_later_cards_are_those_of_earlier_ones() -> None:
    assert [table.known(each) for each in (75, 80, 87, 103, 121)] == [80, 80, 86, 100, 120]
