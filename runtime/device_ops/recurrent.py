"""Linear attention on a device: tokens of one sequence in chunks, by batched products; one token of
each of several sequences by the recurrence itself.

The chunked form is that of codegen/kernels/recurrent/linear_prefill.py: what the tokens of a chunk
have to do with each other is made for many chunks at once, and only the state goes through them one
by one. Decays enter as products of themselves, so a decay of 0 is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hmc.ops.recurrent import chunk_tokens
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.shares import Call


def linear_attention(bound: Bound, step: Step) -> Work:
    """States are read and written in the slots of a call's sequences."""
    op = _Heads(step)
    inputs = {name: bound.tensor(operand) for name, operand in step.inputs.items()}
    y, states = bound.tensor(step.outputs["y"]), bound.cache(step.layer, "recurrent")
    share, device = bound.share(step), bound.device(step)

    def some_sequences(part: slice, slots: Tensor) -> None:
        given = {name: op.by_head(name, tensor[part]) for name, tensor in inputs.items()}
        before = states[slots].view(-1, *op.state)
        made, after = op.step(given, before)
        y[part].copy_(made.flatten(1))
        states.index_copy_(0, slots, after.flatten(1))

    def some_tokens(part: slice, state: Tensor) -> None:
        given = {name: op.by_head(name, tensor[part]) for name, tensor in inputs.items()}
        y[part].copy_(op.tokens(given, state).flatten(1))

    def work(call: Call) -> None:
        count, slots = call.count(share), call.rows[share, device].sequences
        assert slots is not None
        if call.single and count > 1:
            state = states[slots[:1]].view(*op.state)
            for part in scratch.blocks(0, count, op.token_bytes):
                some_tokens(part, state)
            states.index_copy_(0, slots[:1], state.view(1, -1))
            return
        for part in scratch.blocks(0, count, op.sequence_bytes):
            some_sequences(part, slots[part])

    return work


class _Heads:
    """The sizes of a step, and its arithmetic in float32."""

    def __init__(self, step: Step) -> None:
        sizes = ints(step, "heads", "key_heads", "key_dim", "value_dim", "channels", "delta")
        self.heads, self.key_heads, keys, values, channels, self.delta = sizes
        self.tiled = bool(step.attrs["tiled"])
        self.scale, self.chunk = float(step.attrs["scale"]), chunk_tokens(step.attrs)
        self.state = (self.heads, keys, values)
        pairs = self.chunk * (4 * (keys if channels else 1) + 8)
        self.token_bytes = 4 * self.heads * (pairs + 12 * keys + 8 * values)
        self.sequence_bytes = 4 * self.heads * (3 * keys * values + 6 * keys + 6 * values)

    def by_head(self, name: str, rows: Tensor) -> Tensor:
        """Rows [T, width] as [T, heads, width of a head]; queries scaled."""
        if name not in "qk":
            return rows.float().view(len(rows), self.heads, -1)
        found = rows.float().view(len(rows), self.key_heads, -1)
        times = self.heads // self.key_heads
        found = found.repeat(1, times, 1) if self.tiled else found.repeat_interleave(times, 1)
        return found * self.scale if name == "q" else found

    def step(self, x: dict[str, Tensor], before: Tensor) -> tuple[Tensor, Tensor]:
        """y [S, heads, values] and the states after one token of each sequence, from `before` [S,
        heads, keys, values].
        """
        state, new = before * x["decay"][..., None], x["v"]
        if self.delta:
            held = torch.matmul(x["k"][..., None, :], state)[..., 0, :]
            new = (new - held) * x["beta"]
        state.addcmul_(x["k"][..., None], new[..., None, :])
        return torch.matmul(x["q"][..., None, :], state)[..., 0, :], state

    def tokens(self, x: dict[str, Tensor], state: Tensor) -> Tensor:
        """y [T, heads, values] of tokens of one sequence; `state` [heads, keys, values] becomes
        that after them.
        """
        count = len(x["v"])
        chunk = min(self.chunk, count)
        chunks = -(-count // chunk)

        def cut(name: str) -> Tensor:
            """[chunks, heads, chunk, width]; tokens that the last lacks do not decay."""
            lacking = (0, 0, 0, 0, 0, chunks * chunk - count)
            rows = pad(x[name], lacking, value=float(name == "decay"))
            return rows.view(chunks, chunk, *rows.shape[1:]).transpose(1, 2)

        q, k, decay = cut("q"), cut("k"), cut("decay")
        whole = decay.cumprod(2)
        pairs, ends = self._pairs(q, k, decay)
        values = cut("v")
        mixed = self._mixed(pairs[..., :chunk, :], cut("beta")) if self.delta else None
        left = torch.cat([k * whole, q * whole], 2) if self.delta else q * whole
        whole, ends = whole[:, :, -1, :, None], ends.transpose(2, 3)
        made = torch.empty_like(values)
        for at in range(chunks):
            found = torch.bmm(left[at], state)
            new = values[at]
            if mixed is not None:
                new = torch.bmm(mixed[at], new - found[:, :chunk])
            queries = pairs[at, :, -chunk:]
            torch.baddbmm(found[:, -chunk:], queries, new, out=made[at])
            state.mul_(whole[at]).baddbmm_(ends[at], new)
        return made.transpose(1, 2).reshape(chunks * chunk, *made.shape[1::2])[:count]

    def _pairs(self, q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """What keys (with the delta rule) and queries [chunks, heads, chunk or 2 chunk, chunk] have
        to do with keys up to theirs, which decay from token to token; keys decayed to the end.
        """
        chunk = k.shape[2]
        before = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).tril(-1)
        since = torch.where(before[..., None], decay[:, :, :, None], 1.0).cumprod(2)
        ends = k * since[:, :, -1]
        rows = [k, q] if self.delta else [q]
        if decay.shape[-1] == 1:
            found = [torch.matmul(each, k.mT) * since[..., 0] for each in rows]
        else:
            since *= k[:, :, None]
            found = [torch.matmul(since, each[..., None])[..., 0] for each in rows]
        return torch.cat([each.tril_() for each in found], 2), ends

    def _mixed(self, pairs: Tensor, beta: Tensor) -> Tensor:
        """(1 + diag(beta) A)^-1 diag(beta), where A is what lies below the diagonal of `pairs`."""
        chunk = pairs.shape[-1]
        eye = torch.eye(chunk, device=pairs.device) * beta
        found: Tensor = torch.linalg.solve_triangular(
            pairs * beta, eye, upper=False, unitriangular=True
        )
        return found
