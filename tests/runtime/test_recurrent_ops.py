"""Ops with states a sequence on device buffers against their references in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_ops_fake import Buffers, call_of, random, step_of
from layouts import layout
from torch.utils._python_dispatch import TorchDispatchMode

from hmc.blocks.reference import REFERENCES
from hmc.ops import OPS
from hmc.ops.row import Load
from hmc.plan import Step
from hmc.runtime.device_ops import DEVICE_OPS, scratch
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.memory.kv import KVCache

SIZES = {"heads": 4, "key_heads": 2, "key_dim": 12, "value_dim": 20}
CHANNELS_AND_DELTA = [(0, 0), (0, 1), (1, 0), (1, 1)]


def attributes(channels: int, delta: int) -> dict[str, Any]:
    """Heads share keys in one order with the delta rule and in the other without."""
    return {**SIZES, "channels": channels, "delta": delta, "tiled": 1 - delta, "scale": 0.3}


def inputs(tokens: int, attrs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Keys and queries of length 1, decays in (0, 1) and some that are 0."""
    widths = {role.name: role.width(attrs) for role in OPS["linear_attention"].read(attrs)}
    found = {
        name: random(tokens, width, seed=at) for at, (name, width) in enumerate(widths.items())
    }
    for name in "qk":
        rows = found[name].view(tokens, SIZES["key_heads"], -1)
        found[name] = torch.nn.functional.normalize(rows, dim=2).view(tokens, -1)
    for name in {"decay", "beta"} & set(found):
        found[name] = found[name].sigmoid()
    found["decay"][tokens // 2] = 0
    return found


def stepped(
    rows: dict[str, torch.Tensor], attrs: dict[str, Any], lengths: list[tuple[int, int]]
) -> tuple[Step, Buffers, Call]:
    """A step over rows of sequences (past, new tokens), whose states hold something."""
    (state,) = OPS["linear_attention"].states(attrs)
    kv = KVCache(layout(state, block=16, tokens=1024, sequences=8), 1024)
    tokens = sum(new for _, new in lengths)
    values = {**rows, "y": torch.zeros(tokens, SIZES["heads"] * SIZES["value_dim"])}
    buffers = Buffers(values, caches=[random(8, state.width, seed=9)])
    return step_of("linear_attention", buffers, "y", **attrs), buffers, call_of(kv, lengths, [0])


def reference(
    rows: dict[str, torch.Tensor], attrs: dict[str, Any], before: torch.Tensor, single: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    given = {name: (x[None] if single else x[:, None]).double() for name, x in rows.items()}
    states = {"recurrent": before.double()}
    made, after = REFERENCES["linear_attention"](attrs, given, {}, states)
    return made["y"].flatten(0, 1), after["recurrent"]


@pytest.mark.parametrize(("channels", "delta"), CHANNELS_AND_DELTA)
@pytest.mark.parametrize("tokens", [1, 5, 150])
@pytest.mark.parametrize("small", [False, True])
def test_linear_attention_of_one_sequence(
    channels: int, delta: int, tokens: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(scratch, "BYTES", 100_000)
    attrs = attributes(channels, delta)
    rows = inputs(tokens, attrs)
    step, buffers, call = stepped(rows, attrs, [(7, tokens)])
    slot, before = int(call.tables[0]), buffers.caches[0].clone()
    DEVICE_OPS["linear_attention"](buffers, step)(call)  # type: ignore[arg-type]
    y, after = reference(rows, attrs, before[slot][None], single=True)
    assert torch.allclose(buffers.values["y"].double(), y, atol=1e-5)
    assert torch.allclose(buffers.caches[0][slot].double(), after[0], atol=1e-5)
    others = [each for each in range(8) if each != slot]
    assert torch.equal(buffers.caches[0][others], before[others])


@pytest.mark.parametrize(("channels", "delta"), CHANNELS_AND_DELTA)
@pytest.mark.parametrize("small", [False, True])
def test_linear_attention_of_a_batch(
    channels: int, delta: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(scratch, "BYTES", 1)
    attrs = attributes(channels, delta)
    rows = inputs(5, attrs)
    step, buffers, call = stepped(rows, attrs, [(3, 1), (0, 1), (9, 1), (4, 1), (40, 1)])
    slots, before = call.tables.tolist(), buffers.caches[0].clone()
    DEVICE_OPS["linear_attention"](buffers, step)(call)  # type: ignore[arg-type]
    y, after = reference(rows, attrs, before[slots], single=False)
    assert torch.allclose(buffers.values["y"].double(), y, atol=1e-5)
    assert torch.allclose(buffers.caches[0][slots].double(), after, atol=1e-5)


class _Counted(TorchDispatchMode):
    """Operations that compute or move numbers, each a launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        seen = {
            each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)
        }
        view = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() in seen
        empty = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        if func._schema.is_mutable or not (view or empty):
            self.count += 1
        return result


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "delta"), CHANNELS_AND_DELTA)
@pytest.mark.parametrize("lengths", [[(0, 300)], [(5, 1), (0, 1), (4, 1)]])
def test_the_row_tells_about_how_many_launches_there_are(
    channels: int, delta: int, lengths: list[tuple[int, int]]
) -> None:
    attrs = attributes(channels, delta)
    tokens = sum(new for _, new in lengths)
    step, buffers, call = stepped(inputs(tokens, attrs), attrs, lengths)
    work = DEVICE_OPS["linear_attention"](buffers, step)  # type: ignore[arg-type]
    with _Counted() as counted:
        work(call)
    told = OPS["linear_attention"].launches(attrs, Load(tokens, tokens, len(lengths)))
    assert abs(counted.count - told) <= 0.1 * told
