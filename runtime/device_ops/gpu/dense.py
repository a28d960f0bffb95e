"""Steps of norms, sums, rotary embedding and dense matmuls on a GPU, by Triton kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hmc.ops.row import FEW
from hmc.plan import Step
from hmc.runtime.device_ops.base import Bound, Work, in_blocks, ints
from hmc.runtime.device_ops.dense import frequencies
from hmc.runtime.device_ops.matmul import Matrix
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.device_ops.triton import launch, rows
from hmc.runtime.device_ops.triton.launch import Terms, Weight, X

Product = Callable[[X, torch.Tensor], None]
"""Rows of x, and where the result goes."""
_EIGHTS = (8, 9)


def weight_of(matrix: Matrix) -> Weight:
    """A stored matrix as kernels take it."""
    return Weight.of(matrix.planes, matrix.format, matrix.shape, matrix.group)


def in_eights(w: Weight, device: torch.device) -> bool:
    """Whether more than a few rows are multiplied by a weight as sums of FP8 numbers."""
    if w.layout.kind != "e4m3" or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= _EIGHTS


def norm(bound: Bound, step: Step) -> Work:
    """Root-mean-square norm of each of `groups` chunks of a row."""
    x, y = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"])
    gamma, share = bound.vector(step, "gamma"), bound.share(step)
    (groups,), eps = ints(step, "groups"), float(step.attrs["eps"])
    assert gamma is not None

    def work(call: Call) -> None:
        count = call.count(share)
        rows.norm(x[:count], gamma, y[:count], groups=groups, eps=eps)

    return work


def add(bound: Bound, step: Step) -> Work:
    """h + d0, or h + (d0 + d1)."""
    return _sum(bound, step, bound.tensor(step.outputs["y"]), None, None)


def add_norm(bound: Bound, step: Step) -> Work:
    """The sum in f32, and its norm."""
    total, y = (bound.tensor(step.outputs[role]) for role in ("h_out", "y"))
    return _sum(bound, step, total, bound.vector(step, "gamma"), y)


def _sum(
    bound: Bound,
    step: Step,
    total: torch.Tensor,
    gamma: torch.Tensor | None,
    y: torch.Tensor | None,
) -> Work:
    terms = [bound.tensor(operand) for operand in step.inputs.values()]
    share, eps = bound.share(step), float(step.attrs.get("eps", 0.0))

    def work(call: Call) -> None:
        count = call.count(share)
        h, d0, *more = (each[:count] for each in terms)
        normed = None if y is None else y[:count]
        rows.add_norm(h, d0, more[0] if more else None, total[:count], gamma, normed, eps=eps)

    return work


def rotary(bound: Bound, step: Step) -> Work:
    """Rotates `dim` elements of every head in place, after the heads' norm where there is one."""
    x, gamma = bound.tensor(step.inputs["x"]), bound.vector(step, "gamma")
    heads, head_dim, start, dim = ints(step, "heads", "head_dim", "start", "dim")
    share, device = bound.share(step), bound.device(step)
    eps, factor = float(step.attrs["eps"]), float(step.attrs["factor"])
    interleaved = bool(step.attrs["interleaved"])
    inverse = frequencies(bound, step, x.device)

    def work(call: Call) -> None:
        rows.rotary(
            x[: call.count(share)],
            call.rows[share, device].positions,
            inverse(),
            gamma,
            heads=heads,
            head_dim=head_dim,
            start=start,
            dim=dim,
            interleaved=interleaved,
            factor=factor,
            eps=eps,
        )

    return work


def linear(bound: Bound, step: Step) -> Work:
    """x W^T, plus a bias where there is one."""
    w, bias = weight_of(bound.matrix(step, "weight")), bound.vector(step, "bias")
    space = bound.workspace(step)

    def product(x: X, out: torch.Tensor) -> None:
        launch.matmul(x, w, space, out=out, bias=bias)

    return _product(bound, step, w, product)


def gate_up(bound: Bound, step: Step) -> Work:
    """The step's activation of x gate^T and x up^T."""
    gate, up = (weight_of(bound.matrix(step, role)) for role in ("gate", "up"))
    space, act = bound.workspace(step), str(step.attrs["act"])
    biases = bound.vector(step, "gate_bias"), bound.vector(step, "up_bias")

    def product(x: X, out: torch.Tensor) -> None:
        launch.gate_up(x, gate, up, space, out=out, act=act, biases=biases)

    return _product(bound, step, gate, product)


def _product(bound: Bound, step: Step, w: Weight, product: Product) -> Work:
    x, y, share = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"]), bound.share(step)
    eights = in_eights(w, x.device)

    def block(part: slice) -> None:
        given, out = x[part].contiguous(), y[part]
        taken = Terms.of(given, w.layout) if eights and len(given) > FEW else given
        if out.is_contiguous():
            product(taken, out)
        else:
            found = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            product(taken, found)
            out.copy_(found)

    made = 0 if x.is_contiguous() else 2 * x.shape[1]
    made += (2 * x.shape[1] + x.shape[1] // 32) * eights
    made += 0 if y.is_contiguous() else y.shape[1] * y.element_size()
    return in_blocks(share, made, block)
