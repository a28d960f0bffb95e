"""Everything of a layer that is neither attention nor routed: norms, sums, matmuls, rotations.

Sums, norms and rotations are in f32; results are rounded only where the plan's buffer is bf16.
Rows are independent, and done in blocks whose temporaries keep to `scratch.BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hmc.blocks.pointwise import activated
from hmc.codegen.expr import parse, temporaries
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work, in_blocks, ints
from hmc.runtime.device_ops.matmul import EXPANDED, matmul, row_bytes
from hmc.runtime.device_ops.shares import Call


def embed(bound: Bound, step: Step) -> Work:
    """Rows of the table. Plans embed on the host; here for tables that live on a device."""
    ids, y = bound.tensor(step.inputs["ids"]), bound.tensor(step.outputs["y"])
    table, share = bound.matrix(step, "table"), bound.share(step)

    row = y.shape[1] * EXPANDED + 8
    return in_blocks(share, row, lambda part: y[part].copy_(table.picked(ids[part, 0].long())))


def gather_rows(bound: Bound, step: Step) -> Work:
    """The rows whose logits are wanted."""
    x, y = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"])
    device, row = bound.device(step), x.shape[1] * x.element_size()

    def work(call: Call) -> None:
        picked = call.picked[device]
        for part in scratch.blocks(0, len(picked), row):
            y[part].copy_(x[picked[part]])

    return work


def norm(bound: Bound, step: Step) -> Work:
    """Root-mean-square norm of each of `groups` chunks of a row."""
    x, y = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"])
    gamma, share = _gamma(bound, step), bound.share(step)
    (groups,), eps = ints(step, "groups"), float(step.attrs["eps"])

    row = _NORMED * x.shape[1] + 16 * groups

    def block(part: slice) -> None:
        chunks = x[part].view(part.stop - part.start, groups, -1)
        y[part].copy_(normed(chunks, gamma, eps).flatten(1))

    return in_blocks(share, row, block)


_NORMED = 4 + 4
"""Bytes of an element in `normed`: itself in f32, and its square or the result."""


def normed(chunks: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    """f32 norm over the last dimension of `chunks`, times gamma."""
    chunks = chunks.to(torch.float32)
    power = chunks.square().mean(-1, keepdim=True)
    return (chunks * (power + eps).rsqrt()).mul_(gamma.to(torch.float32))


def add(bound: Bound, step: Step) -> Work:
    """h + d0, or h + (d0 + d1)."""
    total, y, share = _sum(bound, step), bound.tensor(step.outputs["y"]), bound.share(step)
    return in_blocks(share, _SUMMED * y.shape[1], lambda part: y[part].copy_(total(part)))


def add_norm(bound: Bound, step: Step) -> Work:
    """The sum in f32, and its norm."""
    total, share = _sum(bound, step), bound.share(step)
    h_out, y = (bound.tensor(step.outputs[role]) for role in ("h_out", "y"))
    gamma, eps = _gamma(bound, step), float(step.attrs["eps"])
    row = max(_SUMMED, 4 + _NORMED) * y.shape[1] + 16

    def block(part: slice) -> None:
        found = total(part)
        h_out[part].copy_(found)
        y[part].copy_(normed(found, gamma, eps))

    return in_blocks(share, row, block)


def linear(bound: Bound, step: Step) -> Work:
    """x W^T, plus a bias where there is one."""
    x, y = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"])
    w, bias, share = bound.matrix(step, "weight"), bound.vector(step, "bias"), bound.share(step)
    row = row_bytes(w)

    def block(part: slice) -> None:
        found = matmul(x[part], w)
        y[part].copy_(found if bias is None else found.add_(bias.to(torch.float32)))

    return in_blocks(share, row, block)


def gate_up(bound: Bound, step: Step) -> Work:
    """The step's activation of x gate^T and x up^T."""
    x, y = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"])
    gate, up, share = bound.matrix(step, "gate"), bound.matrix(step, "up"), bound.share(step)
    biases = [bound.vector(step, role) for role in ("gate_bias", "up_bias")]
    act = str(step.attrs["act"])
    row = max(
        4 * gate.shape[0] + row_bytes(up),
        4 * gate.shape[0] * (2 + temporaries(parse(act))),
    )

    def block(part: slice) -> None:
        products = matmul(x[part], gate), matmul(x[part], up)
        for product, bias in zip(products, biases, strict=True):
            if bias is not None:
                product.add_(bias.to(torch.float32))
        y[part].copy_(activated(act, *products))

    return in_blocks(share, row, block)


def frequencies(bound: Bound, step: Step, device: torch.device) -> Callable[[], torch.Tensor]:
    """Radians a position of a step that rotates, f32 [dim / 2]: a constant of the plan, in calls
    times the exponentials of its weight `alpha`, where it has one.
    """
    constant = bound.plan.constants[str(step.attrs["rope"])]
    inverse = torch.tensor(constant, dtype=torch.float32, device=device)
    alpha = bound.vector(step, "alpha")
    return lambda: inverse if alpha is None else inverse * alpha.to(torch.float32).exp()


def position_scale(bound: Bound, step: Step) -> Work:
    """Heads of a token at position p times scale log(1 + p) + bias, in place."""
    x, (heads, head_dim) = bound.tensor(step.inputs["x"]), ints(step, "heads", "head_dim")
    scale, bias = (bound.vector(step, role) for role in ("scale", "bias"))
    share, device = bound.share(step), bound.device(step)
    assert scale is not None and bias is not None

    def work(call: Call) -> None:
        positions = call.rows[share, device].positions
        for part in scratch.blocks(0, call.count(share), 4 * (4 * heads + heads * head_dim)):
            place = torch.log1p(positions[part].to(torch.float32))[:, None]
            factor = place * scale.to(torch.float32) + bias.to(torch.float32)
            x[part].view(-1, heads, head_dim).mul_(factor[..., None].to(x.dtype))

    return work


def rotary(bound: Bound, step: Step) -> Work:
    """Rotates `dim` elements of every head in place, after the heads' norm where there is one.

    Angles are products in f32, as runtime/host/tables.py makes them.
    """
    x, gamma = bound.tensor(step.inputs["x"]), bound.vector(step, "gamma")
    heads, head_dim, start, dim = ints(step, "heads", "head_dim", "start", "dim")
    share, device = bound.share(step), bound.device(step)
    eps, factor = float(step.attrs["eps"]), float(step.attrs["factor"])
    interleaved = bool(step.attrs["interleaved"])
    inverse = frequencies(bound, step, x.device)

    turning = slice(start, start + dim)
    # of an element of a head: in f32 and normed; of a turning one: both halves of the pair with
    # two products, then the pair and its two halves side by side; of the row: angles and the like
    row = heads * (_NORMED * head_dim + 4 * (dim + dim)) + 4 * 5 * (dim // 2)

    def block(part: slice, positions: torch.Tensor) -> None:
        place = x[part].view(part.stop - part.start, heads, head_dim)
        whole = place.to(torch.float32)
        if gamma is not None:
            whole = normed(whole, gamma, eps)
            place.copy_(whole)
        angle = (positions[part].to(torch.float32)[:, None] * inverse())[:, None]
        cos, sin = angle.cos() * factor, angle.sin() * factor
        old = whole[..., turning]
        a, b = (old[..., 0::2], old[..., 1::2]) if interleaved else old.chunk(2, -1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        place[..., turning].copy_(turned)

    def work(call: Call) -> None:
        positions = call.rows[share, device].positions
        for part in scratch.blocks(0, call.count(share), row):
            block(part, positions)

    return work


def _gamma(bound: Bound, step: Step) -> torch.Tensor:
    gamma = bound.vector(step, "gamma")
    assert gamma is not None
    return gamma


_SUMMED = 4 * 4
"""Bytes of an element in `_sum`: three terms in f32 and the sum."""


def _sum(bound: Bound, step: Step) -> Callable[[slice], torch.Tensor]:
    h, d0 = (bound.tensor(step.inputs[role]) for role in ("h", "d0"))
    d1 = bound.tensor(step.inputs["d1"]) if "d1" in step.inputs else None

    def total(part: slice) -> torch.Tensor:
        more = d0[part].to(torch.float32)
        return h[part].to(torch.float32) + (more if d1 is None else more + d1[part])

    return total
