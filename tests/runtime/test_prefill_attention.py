"""Latent prefill attention against float64 softmax: past or none, scattered blocks, both forms."""

import pytest
import torch

from hmc.runtime import attention
from hmc.runtime.attention import Latent, Past, latent


def softmax_attention(q, k, v, past, scale):
    """Float64, [heads, T, d] over [heads, S, d]."""
    tokens, total = q.shape[1], k.shape[1]
    position = torch.arange(past, past + tokens)[:, None]
    key = torch.arange(total)[None]
    scores = q.double() @ k.double().transpose(1, 2) * scale
    scores = scores.masked_fill(key > position, -1e30)
    return scores.softmax(-1) @ v.double()


def paged(rows, block):
    """Rows [S, heads, dim] as a cache [blocks, heads, block, dim] with strange values in unused
    places, and block ids.
    """
    total, heads, dim = rows.shape
    used = -(-total // block)
    ids = torch.randperm(used + 3)[:used]
    cache = torch.full((used + 3, heads, block, dim), 1e4, dtype=torch.bfloat16)
    for s in range(total):
        cache[ids[s // block], :, s % block] = rows[s].bfloat16()
    return cache, ids


def close(actual, expected, bound):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < bound, error


BOUND = 2.2e-3  # bf16 rounding of the result; everything before it is f32


@pytest.mark.parametrize(("past", "tokens"), [(0, 1), (0, 30), (200, 3), (70, 40)])
def test_latent(past, tokens, monkeypatch):
    torch.manual_seed(1)
    sizes = Latent(heads=5, nope=24, rope=8, v_dim=16, rank=136, scale=0.2)
    total = past + tokens
    rows = torch.randn(total, 1, sizes.rank + sizes.rope)
    cache, ids = paged(rows, 16)
    q = torch.randn(tokens, sizes.heads * 32)
    weight = torch.randn(sizes.heads * 40, sizes.rank) * sizes.rank**-0.5
    exact = weight.double()
    held = rows[:, 0].bfloat16().double()
    expanded = (held[:, : sizes.rank] @ exact.T).view(total, 5, 40).transpose(0, 1)
    shared = held[:, sizes.rank :].expand(5, total, 8)
    expected = softmax_attention(
        q.view(tokens, 5, 32).transpose(0, 1),
        torch.cat((expanded[..., :24], shared), -1),
        expanded[..., 24:],
        past,
        sizes.scale,
    )
    used = set()
    for name in ("_expanded", "_absorbed"):
        plain = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *args, f=plain, n=name: (used.add(n), f(*args))[1]
        )
    for budget in (attention._BYTES, 60_000):
        monkeypatch.setattr(attention, "_BYTES", budget)
        y = torch.empty(tokens, 5 * 16, dtype=torch.bfloat16)
        latent(q, cache, lambda a, b: exact[a:b].float(), Past(ids, past, tokens), y, sizes)
        close(y.view(tokens, 5, 16).transpose(0, 1), expected, BOUND)
    assert used == ({"_absorbed"} if past == 200 else {"_expanded"})
