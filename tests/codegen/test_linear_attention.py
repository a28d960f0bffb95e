"""`linear_attention` and `linear_attention_prefill` against float64, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from emulated import EmulatedJit
from kernel_calls import address, filled, guarded, in_turn
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.kernels.recurrent.linear_form import linear_scratch_bytes
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError

SCALE = 0.3
DECODE, PREFILL = "linear_attention", "linear_attention_prefill"
SIZES = [(6, 2, 33, 70), (3, 3, 7, 1), (4, 2, 64, 128)]
"""Heads, key heads, key and value dimensions."""
FORMS = [((0, 0), (1, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0))]
"""Some of channels and delta for each."""


@dataclass
class Inputs:
    """Rows of tokens, by head."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    decay: np.ndarray
    beta: np.ndarray

    @staticmethod
    def random(tokens: int, sizes: tuple[int, ...], channels: int, seed: int = 0) -> Inputs:
        """Keys and queries of length 1, decays in (0.4, 1]."""
        rng = np.random.default_rng(seed)
        heads, key_heads, keys, values = sizes

        def units() -> np.ndarray:
            found = rng.standard_normal((tokens, key_heads, keys))
            return (found / np.linalg.norm(found, axis=2, keepdims=True)).astype(np.float32)

        decay = np.exp(-rng.random((tokens, heads, keys if channels else 1)))
        v = rng.standard_normal((tokens, heads, values), dtype=np.float32)
        beta = rng.random((tokens, heads), dtype=np.float32)
        return Inputs(units(), units(), v, decay.astype(np.float32), beta)

    def part(self, some: slice) -> Inputs:
        """Some of the tokens."""
        return Inputs(*(each[some] for each in vars(self).values()))


def exact(
    x: Inputs, state: np.ndarray, slots: np.ndarray, delta: int, tiled: bool = False
) -> tuple[np.ndarray, ...]:
    """y [tokens, heads, values] and the states after it, in float64."""
    kept, y = state.astype(np.float64), np.zeros(x.v.shape)
    key_heads = x.k.shape[1]
    group = x.v.shape[1] // key_heads
    for t, slot in enumerate(slots):
        for h in range(x.v.shape[1]):
            of = h % key_heads if tiled else h // group
            k, q = (each[t, of].astype(np.float64) for each in (x.k, x.q))
            held = kept[slot, h] * x.decay[t, h][:, None]
            new = (x.v[t, h] - k @ held) * x.beta[t, h] if delta else x.v[t, h]
            kept[slot, h] = held + np.outer(k, new)
            y[t, h] = SCALE * (q @ kept[slot, h])
    return y, kept


def call(
    jit: Jit,
    isa: str,
    op: str,
    x: Inputs,
    state: np.ndarray,
    slots: np.ndarray,
    delta: int,
    workers: int = 1,
    **more: int,
) -> np.ndarray:
    """y; `state` f32 [slots, heads, keys, values] changes in place."""
    tokens, heads, values = x.v.shape
    spec = KernelSpec.of(
        op, isa, heads=heads, key_heads=x.k.shape[1], key_dim=x.k.shape[2], value_dim=values,
        channels=int(x.decay.shape[2] > 1 or x.k.shape[2] == 1), delta=delta, **more,
    )  # fmt: skip
    rows = {name: guarded(each.reshape(tokens, -1)) for name, each in vars(x).items()}
    y = rows["y"] = filled((tokens, heads * values + 1), np.float32)
    if not delta:
        del rows["beta"]
    args = {"beta": 0, "beta_stride": 0}
    args |= {name: address(each) for name, each in rows.items()}
    args |= {f"{name}_stride": each.shape[1] for name, each in rows.items()}
    if op == PREFILL:
        scratch = guarded(np.full(workers * linear_scratch_bytes(spec) // 4, np.nan, np.float32))
        args["scratch"] = address(scratch)
    ids = guarded(slots.astype(np.int32))
    in_turn(
        jit, spec, workers, state=address(state), sequence=address(ids), tokens=tokens,
        scale=SCALE, **args,
    )  # fmt: skip
    assert (y[:, -1] == 77).all()
    return y[:, :-1].reshape(tokens, heads, values)


def states(sizes: tuple[int, ...], slots: int = 3) -> np.ndarray:
    """States of `slots` that something was written to before."""
    heads, _, keys, values = sizes
    rng = np.random.default_rng(9)
    return guarded(rng.standard_normal((slots, heads, keys, values), dtype=np.float32))


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Within the rounding of sums of numbers of a few units."""
    return bool(np.abs(found - wanted).max() < 1e-5)


@pytest.mark.few(3)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("sizes", "forms"), list(zip(SIZES, FORMS, strict=True)))
def test_linear_attention(
    jit: Jit, isa: str, sizes: tuple[int, ...], forms: tuple[tuple[int, int], ...]
) -> None:
    """Tokens of one sequence and of several, which share slots or do not; the share of a worker
    changes nothing.
    """
    need(isa)
    for channels, delta in forms:
        for op, slots in ((DECODE, [2, 0, 2, 2, 1]), (DECODE, [1, 2]), (PREFILL, [1] * 37)):
            used = np.array(slots)
            x = Inputs.random(len(used), sizes, channels)
            found = []
            for workers in (1, 5):
                state = states(sizes)
                found.append((call(jit, isa, op, x, state, used, delta, workers), state))
            y, kept = exact(x, states(sizes), used, delta)
            assert close(found[0][0], y) and close(found[0][1], kept)
            others = np.setdiff1d(np.arange(3), used)
            assert (found[0][1][others] == states(sizes)[others]).all()
            for first, second in zip(*found, strict=True):
                assert (first == second).all()


@pytest.mark.few(2)
@pytest.mark.parametrize("isa", TIERS)
def test_heads_that_share_keys_may_lie_apart(jit: Jit, isa: str) -> None:
    need(isa)
    sizes, used = (6, 2, 16, 24), np.array([1] * 9)
    x = Inputs.random(len(used), sizes, 0)
    y, kept = exact(x, states(sizes), used, 1, tiled=True)
    for op in (DECODE, PREFILL):
        state = states(sizes)
        assert close(call(jit, isa, op, x, state, used, 1, tiled=1), y) and close(state, kept)


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("channels", [0, 1])
def test_prompts_in_parts_are_as_whole(jit: Jit, isa: str, channels: int) -> None:
    """Parts of any length, decode steps between them."""
    need(isa)
    sizes = (2, 1, 24, 40)
    x, used = Inputs.random(150, sizes, channels), np.zeros(150, np.int64)
    y, kept = exact(x, states(sizes), used, 1)
    for lengths in ([150], [64, 64, 22], [7] * 21 + [3], [1] * 9 + [141]):
        state, start = states(sizes), 0
        for number, length in enumerate(lengths):
            part = slice(start, start + length)
            op = DECODE if length < 10 and number % 2 else PREFILL
            assert close(call(jit, isa, op, x.part(part), state, used[part], 1), y[part])
            start += length
        assert close(state, kept)


@pytest.mark.parametrize("op", [DECODE, PREFILL])
@pytest.mark.parametrize("channels", [0, 1])
def test_what_decays_to_nothing_is_gone(jit: Jit, op: str, channels: int) -> None:
    """Decays of 0, and products of decays below the smallest f32."""
    sizes = (2, 2, 16, 16)
    x, used = Inputs.random(20, sizes, channels), np.zeros(20, np.int64)
    x.decay[:6] = 1e-20
    x.decay[11, :, ::3] = 0
    state = states(sizes)
    y, kept = exact(x, state, used, 1)
    assert close(call(jit, "avx2", op, x, state, used, 1), y) and close(state[0], kept[0])


def test_linear_attention_of_the_best_tier_on_any_machine() -> None:
    jit, sizes = EmulatedJit(EMITTERS), (2, 1, 16, 24)
    x, used = Inputs.random(18, sizes, 1), np.ones(18, np.int64)
    y, kept = exact(x, states(sizes), used, 1)
    for op in (DECODE, PREFILL):
        state = states(sizes)
        assert close(call(jit, next(iter(TIERS)), op, x, state, used, 1), y)
        assert close(state, kept)


def test_sizes_that_do_not_fit_are_refused(jit: Jit) -> None:
    sizes = {"heads": 4, "key_dim": 8, "value_dim": 8, "channels": 0, "delta": 1}
    with pytest.raises(KernelError, match="cannot share 3 key heads by 4 heads"):
        jit.ir_text(KernelSpec.of(DECODE, "avx2", key_heads=3, **sizes))
    with pytest.raises(KernelError, match="needs channels 0 or 1"):
        jit.ir_text(KernelSpec.of(PREFILL, "avx2", key_heads=2, **(sizes | {"channels": 2})))
