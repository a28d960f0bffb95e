"""Kernels of attention, rows and routing compiled ahead of time: no spills, shared memory fits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from triton_gpu import assembled
from triton_weights import random_weight

from hmc.codegen.triton import table
from hmc.formats import format_of
from hmc.ops.attention import Bounds, Growth
from hmc.ops.routing import Routing
from hmc.runtime.device_ops.triton import attention, routing, rows
from hmc.runtime.device_ops.triton.launch import Workspace

WORK = Workspace(torch.device("cpu"))
TABLES, LENGTHS = torch.zeros(1, 2048, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)


def halves(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def few(kv_heads: int, group: int, head_dim: int, v_dim: int, window: int = 0, softcap: float = 0.0,
        sinks: bool = False, chunk: int = 0, growth: Growth = None) -> None:  # fmt: skip
    heads = kv_heads * group
    attention.attend(
        torch.zeros(1, heads * head_dim), halves(1, kv_heads * head_dim),
        halves(1, kv_heads * v_dim), TABLES, LENGTHS, halves(1, heads * v_dim), WORK,
        kv_heads=kv_heads, head_dim=head_dim, v_dim=v_dim, scale=0.1, block=16,
        bounds=Bounds(window, chunk), softcap=softcap, growth=growth,
        sinks=torch.zeros(heads) if sinks else None,
    )  # fmt: skip


def many(kv_heads: int, group: int, head_dim: int, v_dim: int, window: int = 0,
         softcap: float = 0.0, sinks: bool = False, chunk: int = 0,
         growth: Growth = None) -> None:  # fmt: skip
    heads = kv_heads * group
    attention.prompt(
        torch.zeros(3, heads * head_dim), halves(7, kv_heads, head_dim),
        halves(7, kv_heads, v_dim), halves(3, heads * v_dim), scale=0.1,
        bounds=Bounds(window, chunk), softcap=softcap, sinks=torch.zeros(heads) if sinks else None,
        growth=growth,
    )  # fmt: skip


def lifted(heads: int, nope: int, rope: int, v_dim: int) -> None:
    keys, values = halves(7, heads, nope + v_dim).split((nope, v_dim), 2)
    attention.prompt(
        torch.zeros(3, heads * (nope + rope)), keys, values, halves(3, heads * v_dim),
        turned=halves(7, rope), scale=0.1,
    )  # fmt: skip


def latent(form: str, heads: int, nope: int, rope: int, v_dim: int, rank: int) -> None:
    kv_b, _ = random_weight(format_of(form), heads * (nope + v_dim), rank)
    attends = partial(
        attention.over_latents, cache=halves(1, rank + rope), tables=TABLES, lengths=LENGTHS,
        work=WORK, rank=rank, scale=0.1, block=16,
    )  # fmt: skip
    attention.latent(
        torch.zeros(1, heads * (nope + rope)), kv_b, halves(1, heads * v_dim), attends,
        heads=heads, nope=nope, rope=rope, v_dim=v_dim,
    )  # fmt: skip


def norms() -> None:
    wide, narrow = torch.zeros(3, 7168), torch.zeros(3, 4096)
    rows.norm(wide, halves(7168), halves(3, 7168), groups=1, eps=1e-6)
    rows.add_norm(wide, wide, wide, wide, halves(7168), halves(3, 7168), eps=1e-6)
    positions, inverse = torch.zeros(3, dtype=torch.int64), torch.zeros(64)
    rows.rotary(narrow, positions, inverse, halves(128), heads=32, head_dim=128, start=0, dim=128,
                interleaved=False)  # fmt: skip
    cache = halves(9, 576)
    attention.append((wide[:, :512], wide[:, 512:576]), (cache[:, :512], cache[:, 512:]), positions)


def route(scoring: int, groups: int, top_groups: int) -> None:
    routing.route(
        torch.zeros(3, 256), torch.zeros(256), None, torch.zeros(3, 8, dtype=torch.int32),
        torch.zeros(3, 8), Routing(scoring, True, groups, top_groups),
    )  # fmt: skip


def sort(slots: int) -> None:
    ids, edges = torch.zeros(slots, dtype=torch.int32), torch.zeros(385, dtype=torch.int32)
    routing.by_expert(ids, ids, edges, WORK)


LAUNCHES: dict[str, Callable[[], None]] = {
    "attend 128": partial(few, 8, 4, 128, 128),
    "prompt 128": partial(many, 8, 4, 128, 128),
    "attend 40": partial(few, 2, 3, 40, 40),
    "attend 64 sinks": partial(few, 8, 8, 64, 64, 128, 0.0, True),
    "attend 192": partial(few, 4, 16, 192, 128),
    "attend 512": partial(few, 2, 8, 512, 512),
    "attend 128 chunks": partial(few, 8, 5, 128, 128, chunk=8192),
    "attend 128 longer": partial(few, 8, 5, 128, 128, growth=(0.1, 8192, 1)),
    "attend 256 capped": partial(few, 4, 2, 256, 256, 1024, 50.0),
    "prompt 40": partial(many, 2, 3, 40, 40),
    "prompt 64 sinks": partial(many, 8, 8, 64, 64, 128, 0.0, True),
    "prompt 80": partial(many, 8, 4, 80, 80),
    "prompt 128 window": partial(many, 8, 4, 128, 128, 1024, 50.0, True),
    "prompt 192": partial(many, 128, 1, 192, 128),
    "prompt lifted": partial(lifted, 128, 128, 64, 128),
    "prompt lifted 256": partial(lifted, 20, 192, 64, 256),
    "prompt 192 sinks": partial(many, 8, 8, 192, 128, 128, 0.0, True),
    "prompt 512": partial(many, 2, 8, 512, 512),
    "prompt 128 chunks": partial(many, 8, 5, 128, 128, chunk=8192),
    "prompt 128 longer": partial(many, 8, 5, 128, 128, growth=(0.1, 8192, 1)),
    "prompt 256": partial(many, 4, 2, 256, 256),
    "prompt 256 capped": partial(many, 4, 2, 256, 256, 1024, 50.0),
    "latent fp8": partial(latent, "fp8", 128, 128, 64, 128, 512),
    "latent bf16": partial(latent, "bf16", 16, 128, 64, 128, 512),
    "latent int4": partial(latent, "int4", 64, 192, 64, 256, 512),
    "latent f32": partial(latent, "f32", 20, 192, 64, 256, 512),
    "norms": norms,
    "route in groups": partial(route, 1, 8, 4),
    "route softmax": partial(route, 0, 0, 0),
    "route chosen": partial(route, 2, 0, 0),
    "sort few": partial(sort, 128),
    "sort many": partial(sort, 160_000),
}


def check(name: str, arch: int) -> None:
    for kernel, made in assembled(arch, LAUNCHES[name]).items():
        assert made.spilled == 0, kernel
        assert made.shared <= table.SHARED[arch] * 1024, kernel
        if kernel.startswith(("attend", "absorb", "lift")):
            assert made.instruction, kernel


@pytest.mark.few(2)
@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize("name", ["attend 128", "prompt 128"])
def test_some_kernels(name: str, arch: int) -> None:
    check(name, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", table.SHARED)
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_kernel_everywhere(name: str, arch: int) -> None:
    check(name, arch)
