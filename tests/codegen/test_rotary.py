"""`rotary` against float64 (errors below 2e-6 at values of a few units) and against transformers'
DeepSeek form.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_calls import address, as_format, guarded, in_turn
from kernel_meanings import rotary
from prefill_data import need
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError

EPS = 1e-6


def angles(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [50 positions, dim / 2]."""
    frequency = 100.0 ** (-np.arange(dim // 2) * 2 / dim)
    turn = np.arange(50)[:, None] * frequency
    return guarded(np.cos(turn).astype(np.float32)), guarded(np.sin(turn).astype(np.float32))


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(
    ("heads", "head_dim", "start", "dim"), [(3, 128, 0, 128), (2, 48, 8, 34), (5, 7, 1, 6)]
)
def test_rotary(
    jit: Jit, isa: str, interleaved: int, heads: int, head_dim: int, start: int, dim: int
) -> None:
    need(isa)
    rng = np.random.default_rng(head_dim)
    cos, sin = angles(dim)
    stored, factors = as_format(rng.standard_normal(head_dim), "bf16")
    for tokens, weight, gamma in ((1, "", None), (33, "bf16", stored), (3, "bf16", None)):
        spec = KernelSpec.of(
            "rotary", isa, weight=weight, heads=heads, head_dim=head_dim, start=start, dim=dim,
            interleaved=interleaved,
        )  # fmt: skip
        before = rng.standard_normal((tokens, heads * head_dim + 1)).astype(np.float32)
        positions = guarded(rng.integers(0, 50, tokens).astype(np.int32))
        results = []
        for workers in (1, 2, 4):
            x = guarded(before)
            in_turn(
                jit, spec, workers, x=address(x), x_stride=x.shape[1], gamma=address(gamma),
                cos=address(cos), sin=address(sin), positions=address(positions), tokens=tokens,
                eps=EPS,
            )  # fmt: skip
            results.append(x)
        exact = rotary(
            before[:, :-1].reshape(tokens, heads, head_dim),
            factors if gamma is not None else None,
            cos, sin, positions, start=start, dim=dim, interleaved=bool(interleaved), eps=EPS,
        )  # fmt: skip
        assert np.abs(results[0][:, :-1].reshape(exact.shape) - exact).max() < 2e-6
        assert (results[0][:, -1] == before[:, -1]).all()
        assert all((result == results[0]).all() for result in results[1:])


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 128), (5, 7)])
def test_position_scale(jit: Jit, isa: str, heads: int, head_dim: int) -> None:
    """Against float64, as far as there are positions."""
    need(isa)
    rng = np.random.default_rng(heads)
    before = rng.standard_normal((9, heads * head_dim + 1)).astype(np.float32)
    positions = guarded(np.array([0, 1, 2, 17, 511, 4095, 65535, 1 << 20, (1 << 24) - 2], np.int32))
    scale, bias = (guarded(rng.standard_normal(heads).astype(np.float32)) for _ in range(2))
    exact = np.log(positions + 1.0)[:, None] * scale.astype(np.float64) + bias
    exact = before[:, :-1].reshape(9, heads, head_dim) * exact[..., None]
    for workers in (1, 4):
        x = guarded(before)
        in_turn(
            jit, KernelSpec.of("position_scale", isa, heads=heads, head_dim=head_dim), workers,
            x=address(x), x_stride=x.shape[1], scale=address(scale), bias=address(bias),
            positions=address(positions), tokens=9,
        )  # fmt: skip
        found = x[:, :-1].reshape(exact.shape)
        assert np.abs(found - exact).max() < 1e-6 * np.abs(exact).max()
        assert (x[:, -1] == before[:, -1]).all()


def test_pairs_turn_as_in_deepseek(jit: Jit) -> None:
    """transformers gathers the even elements in front; ours stay in place, which dot products
    cannot tell.
    """
    rng = np.random.default_rng(0)
    cos, sin = angles(16)
    x = guarded(rng.standard_normal((4, 2 * 16)).astype(np.float32))
    positions = guarded(np.array([0, 3, 7, 49], np.int32))
    q = torch.from_numpy(x.copy()).view(1, 4, 2, 16).transpose(1, 2)
    both = [torch.from_numpy(np.tile(t[positions], 2))[None] for t in (cos, sin)]
    theirs, _ = apply_rotary_pos_emb_interleave(q, q, *both)  # type: ignore[no-untyped-call]
    spec = KernelSpec.of("rotary", "avx2", heads=2, head_dim=16, start=0, dim=16, interleaved=1)
    in_turn(
        jit, spec, 1, x=address(x), x_stride=32, gamma=0, cos=address(cos), sin=address(sin),
        positions=address(positions), tokens=4, eps=EPS,
    )  # fmt: skip
    ours = x.reshape(4, 2, 16)
    front = np.concatenate([ours[..., 0::2], ours[..., 1::2]], axis=-1)
    assert np.abs(front - theirs[0].transpose(0, 1).numpy()).max() < 2e-6


def test_a_slice_outside_the_head_is_refused(jit: Jit) -> None:
    spec = KernelSpec.of("rotary", "avx2", heads=1, head_dim=8, start=4, dim=6, interleaved=0)
    with pytest.raises(KernelError, match="6 of 8 elements from 4"):
        jit.ir_text(spec)
