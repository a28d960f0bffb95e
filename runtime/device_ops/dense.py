"""Everything of a layer that is neither attention nor routed: norms, sums, matmuls, rotations.

Sums, norms and rotations are in f32; results are rounded only where the plan's buffer is bf16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hmc.plan import Step
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.matmul import matmul
from hmc.runtime.shares import Call


def embed(bound: Bound, step: Step) -> Work:
    """Rows of the table. Plans embed on the host; here for tables that live on a device."""
    ids, y = bound.tensor(step.inputs["ids"]), bound.tensor(step.outputs["y"])
    table, share = bound.matrix(step, "table"), bound.share(step)

    def work(call: Call) -> None:
        count = call.count(share)
        y[:count].copy_(table.data[ids[:count, 0].long()])

    return work


def gather_rows(bound: Bound, step: Step) -> Work:
    """The rows whose logits are wanted."""
    x, y = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"])
    device = bound.device(step)

    def work(call: Call) -> None:
        picked = call.picked[device]
        y[: len(picked)].copy_(x[picked])

    return work


def norm(bound: Bound, step: Step) -> Work:
    """Root-mean-square norm of each of `groups` chunks of a row."""
    x, y = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"])
    gamma, share = _gamma(bound, step), bound.share(step)
    (groups,), eps = ints(step, "groups"), float(step.attrs["eps"])

    def work(call: Call) -> None:
        count = call.count(share)
        chunks = x[:count].reshape(count, groups, -1)
        y[:count].copy_(normed(chunks, gamma, eps).flatten(1))

    return work


def normed(chunks: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    """f32 norm over the last dimension of `chunks`, times gamma."""
    chunks = chunks.to(torch.float32)
    power = chunks.square().mean(-1, keepdim=True)
    return chunks * (power + eps).rsqrt() * gamma.to(torch.float32)


def add(bound: Bound, step: Step) -> Work:
    """h + d0, or h + (d0 + d1)."""
    total, y, share = _sum(bound, step), bound.tensor(step.outputs["y"]), bound.share(step)

    def work(call: Call) -> None:
        count = call.count(share)
        y[:count].copy_(total(count))

    return work


def add_norm(bound: Bound, step: Step) -> Work:
    """The sum in f32, and its norm."""
    total, share = _sum(bound, step), bound.share(step)
    h_out, y = (bound.tensor(step.outputs[role]) for role in ("h_out", "y"))
    gamma, eps = _gamma(bound, step), float(step.attrs["eps"])

    def work(call: Call) -> None:
        count = call.count(share)
        found = total(count)
        h_out[:count].copy_(found)
        y[:count].copy_(normed(found, gamma, eps))

    return work


def linear(bound: Bound, step: Step) -> Work:
    """x W^T, plus a bias where there is one."""
    x, y = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"])
    w, bias, share = bound.matrix(step, "weight"), bound.vector(step, "bias"), bound.share(step)

    def work(call: Call) -> None:
        count = call.count(share)
        found = matmul(x[:count], w)
        y[:count].copy_(found if bias is None else found.add_(bias.to(torch.float32)))

    return work


def gate_up(bound: Bound, step: Step) -> Work:
    """silu(x gate^T) * (x up^T)."""
    x, y = bound.tensor(step.inputs["x"]), bound.tensor(step.outputs["y"])
    gate, up, share = bound.matrix(step, "gate"), bound.matrix(step, "up"), bound.share(step)

    def work(call: Call) -> None:
        count = call.count(share)
        rows = x[:count]
        y[:count].copy_(torch.nn.functional.silu(matmul(rows, gate)).mul_(matmul(rows, up)))

    return work


def rotary(bound: Bound, step: Step) -> Work:
    """Rotates `dim` elements of every head in place, after the heads' norm where there is one.

    Angles are products in f32, as runtime/tables.py makes them.
    """
    x, gamma = bound.tensor(step.inputs["x"]), bound.vector(step, "gamma")
    heads, head_dim, start, dim = ints(step, "heads", "head_dim", "start", "dim")
    share, device = bound.share(step), bound.device(step)
    eps, factor = float(step.attrs["eps"]), float(step.attrs["factor"])
    interleaved = bool(step.attrs["interleaved"])
    inverse = torch.tensor(
        bound.plan.constants[str(step.attrs["rope"])], dtype=torch.float32, device=x.device
    )

    def work(call: Call) -> None:
        count = call.count(share)
        positions = call.rows[share, device].positions
        whole = x[:count].reshape(count, heads, head_dim).to(torch.float32)
        if gamma is not None:
            whole = normed(whole, gamma, eps)
        angle = (positions.to(torch.float32)[:, None] * inverse)[:, None]
        cos, sin = angle.cos() * factor, angle.sin() * factor
        part = whole[..., start : start + dim]
        a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        parts = (whole[..., :start], turned, whole[..., start + dim :])
        x[:count].copy_(torch.cat(parts, -1).flatten(1))

    return work


def _gamma(bound: Bound, step: Step) -> torch.Tensor:
    gamma = bound.vector(step, "gamma")
    assert gamma is not None
    return gamma


def _sum(bound: Bound, step: Step) -> Callable[[int], torch.Tensor]:
    h, d0 = (bound.tensor(step.inputs[role]) for role in ("h", "d0"))
    d1 = bound.tensor(step.inputs["d1"]) if "d1" in step.inputs else None

    def total(count: int) -> torch.Tensor:
        more = d0[:count].to(torch.float32)
        return h[:count].to(torch.float32) + (more if d1 is None else more + d1[:count])

    return total
