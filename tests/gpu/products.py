"""Section of the GPU check: which way FP8 products take on the device, how exact and how fast they
are, and what a launch and a wait cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from gpu.models import quantised
from gpu.rows import Clock, Row
from gpu.sizes import Bench
from hmc.runtime.device_ops.gpu import dense
from hmc.runtime.device_ops.matmul import Matrix, matmul
from hmc.runtime.device_ops.triton import launch

Product = Callable[[torch.Tensor], torch.Tensor]
_PASSES = 5
_BOUND = 2.0**-8
"""Error over the sum of the products' magnitudes: what one rounding of x to bf16 may cost."""
_RAGGED = 40


def products(bench: Bench, clock: Clock) -> Iterator[Row]:
    """An FP8 product of whole blocks and one of ragged ones, and the latencies that the probe of
    this run found."""
    rows, columns, tokens = bench.sizes.product
    for shape in ((rows, columns), (rows - _RAGGED, columns - _RAGGED)):
        case = f"fp8 {shape[0]}x{shape[1]}, {tokens} tokens"
        clock.check(case)
        yield from _product(bench, case, shape, tokens)
    rates = bench.machine.gpus[0].rates
    assert rates is not None
    yield Row("products", "latency", "launch", rates.launch.value, "s", note=rates.launch.source)
    yield Row("products", "latency", "copy and wait", rates.sync.value, "s", note=rates.sync.source)


def _product(bench: Bench, case: str, shape: tuple[int, int], tokens: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(tokens)
    codes, scale = quantised(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    device = bench.device
    w = Matrix((codes.to(device), scale.to(device)), "fp8", shape)
    x = torch.randn((tokens, shape[1]), generator=generator).to(torch.bfloat16).to(device)
    product, route = _product_of(w)
    found = product(x).to("cpu", torch.float64)
    exact = w.rows(0, shape[0]).to("cpu", torch.float64)
    left = x.to("cpu", torch.float64)
    off = (found - left @ exact.t()).abs() / (left.abs() @ exact.abs().t())
    worst = float(off.max())
    yield Row(
        "products",
        case,
        f"error of {route}, against float64",
        worst,
        against="bound",
        reference=_BOUND,
        verdict="ok" if worst <= _BOUND else "FAILED",
    )
    seconds = median(_seconds(x, product) for _ in range(_PASSES))
    rates = bench.machine.gpus[0].rates
    assert rates is not None
    yield Row(
        "products",
        case,
        f"speed of {route}",
        2 * tokens * shape[0] * shape[1] / seconds,
        "FLOP/s",
        "plain products, probed",
        (rates.fp8 or rates.bf16).value,
    )


def _product_of(w: Matrix) -> tuple[Product, str]:
    """What multiplies rows by a matrix where it is, and what it is called."""
    if w.data.device.type != "cuda":
        return lambda x: matmul(x, w), "f32 products"
    stored, space = dense.weight_of(w), launch.Workspace(w.data.device)
    if not dense.in_eights(stored, w.data.device):
        return lambda x: launch.matmul(x, stored, space), "bf16 products"
    terms = launch.Terms.of
    return lambda x: launch.matmul(terms(x, stored.layout), stored, space), "two FP8 products"


def _seconds(x: torch.Tensor, product: Product) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    product(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
