"""Which weights are pinned for GPUs, with what flags, and what a refusal says."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from split_plans import STREAM, split_plan

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.errors import MachineError
from hmc.plan import Plan
from hmc.runtime.binding.phase import Binding
from hmc.runtime.binding.pinned import whole_pages
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.host.lowering import Parts
from hmc.runtime.host.pool import Pool
from hmc.runtime.memory.kv import KVCache
from hmc.runtime.weights.store import WeightStore
from hmc.runtime.weights.torch_view import view

PORTABLE, READ_ONLY = 1, 8


class Runtime:
    """CUDA's runtime as far as pinning goes: what is pinned now, by address; it may refuse."""

    def __init__(self) -> None:
        self.ranges: dict[int, tuple[int, int]] = {}
        self.refuse_flags = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if flags & self.refuse_flags:
            return 801
        for start, (size, _) in self.ranges.items():
            assert address + nbytes <= start or start + size <= address, "pinned twice"
        self.ranges[address] = nbytes, flags
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.ranges.pop(address, None) else 713


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    return found


@pytest.fixture(scope="module")
def directory(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("mixtral", "bf16", layers=2)


@pytest.fixture(scope="module")
def plan(directory: Path) -> Plan:
    return split_plan(directory)


@pytest.fixture
def bound(plan: Plan) -> Iterator[Callable[..., Binding]]:
    """`bound(store)`: the streaming phase with its weights pinned."""
    with ExitStack() as stack:
        jit = Jit(EMITTERS)
        pool = stack.enter_context(Pool(jit, TIERS[plan.isa], 1))
        kv = KVCache(plan.kv, plan.limits.max_context)
        stack.callback(kv.close)

        def bind(store: WeightStore) -> Binding:
            backend = HostBackend(1, 1 << 30)
            stack.callback(backend.close)
            return Binding(
                Parts(plan, store, kv, jit, pool),
                backend.devices,
                names=[STREAM],
                pin=True,
            )

        yield bind


def weights_of(runtime: Runtime, binding: Binding) -> dict[int, tuple[int, int]]:
    """What is pinned but the host's buffers."""
    buffers = {address for phase in binding.phases.values() for address, _ in phase.pinnable}
    return {at: rest for at, rest in runtime.ranges.items() if at not in buffers}


@pytest.mark.parametrize("home", ["mapped", "arena", "shared"])
def test_the_weights_that_gpus_stream_are_pinned_where_they_are(
    home: Any, plan: Plan, directory: Path, runtime: Runtime, bound: Callable[..., Binding]
) -> None:
    store = WeightStore.open(plan, directory, home=home)
    with bound(store) as binding:
        found = weights_of(runtime, binding)
        phase = binding.phases[STREAM]
        copies = [
            (address, len(target))
            for step in phase.phase.steps
            if step.op == "load"
            for address, target in phase.copies(step)
        ]
        assert copies
        for address, nbytes in copies:
            assert any(at <= address and address + nbytes <= at + n for at, (n, _) in found.items())
        flags = PORTABLE | (READ_ONLY if home == "mapped" else 0)
        assert {each for _, each in found.values()} == {flags}
        if store.arena is not None:
            address, nbytes = store.arena.address, store.arena.size
            assert found == {address: (nbytes, flags)}
        assert f"GiB of {home} weights are pinned for the GPUs, in {len(found)} range" in (
            binding.pinned
        )
    assert not runtime.ranges
    store.close()


@pytest.mark.parametrize("home", ["mapped", "arena", "shared"])
def test_no_copy_is_of_memory_that_is_pinned_in_part(
    home: Any,
    plan: Plan,
    directory: Path,
    runtime: Runtime,
    bound: Callable[..., Binding],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied = []

    def seen(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        (end,) = (address + size for size in shape)
        spans = [(at, at + size) for at, (size, _) in runtime.ranges.items()]
        pinned = sum(max(0, min(end, last) - max(address, first)) for first, last in spans)
        copied.append((pinned, end - address))
        return view(address, dtype, shape)

    monkeypatch.setattr("hmc.runtime.binding.weights.view", seen)
    store = WeightStore.open(plan, directory, home=home)
    with bound(store):
        assert copied
        assert all(pinned in (0, size) for pinned, size in copied)
    store.close()


def test_what_another_process_filled_is_pinned_to_be_read(
    plan: Plan, directory: Path, runtime: Runtime, bound: Callable[..., Binding]
) -> None:
    first = WeightStore.open(plan, directory, home="shared")
    assert first.arena is not None
    store = WeightStore.attach(plan, first.arena.descriptor)
    with bound(store) as binding:
        assert [flags for _, flags in weights_of(runtime, binding).values()] == [9]
    store.close()
    first.close()


def test_a_refusal_says_what_to_do(
    plan: Plan, directory: Path, runtime: Runtime, bound: Callable[..., Binding]
) -> None:
    runtime.refuse_flags = READ_ONLY
    store = WeightStore.open(plan, directory)
    with pytest.raises(MachineError, match=r"error 801\): .* with --home arena$") as caught:
        bound(store)
    assert "\n" not in str(caught.value)
    assert not runtime.ranges
    store.close()


RANGES = st.lists(st.tuples(st.integers(0, 1 << 17), st.integers(1, 1 << 14)))


@given(RANGES)
def test_pages_hold_every_range_and_do_not_meet(ranges: list[tuple[int, int]]) -> None:
    pages = whole_pages(ranges)
    assert all(not address % mmap.PAGESIZE and not n % mmap.PAGESIZE for address, n in pages)
    for (first, nbytes), (second, _) in pairwise(pages):
        assert first + nbytes < second
    for address, nbytes in ranges:
        assert any(at <= address and address + nbytes <= at + n for at, n in pages)
    touched = {
        page
        for address, nbytes in ranges
        for page in range(address // mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE))
    }
    assert sum(nbytes for _, nbytes in pages) == len(touched) * mmap.PAGESIZE
