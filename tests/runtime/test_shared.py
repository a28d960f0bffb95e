"""Memory that processes share: one copy, sealed, gone with its last user."""

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hmc
from hmc.errors import CapacityError, ExecutionError, PlanMismatchError, ShardError
from hmc.machine import detect
from hmc.plan.file import save
from hmc.runtime.memory import shared
from hmc.runtime.memory.blocks import HUGE_PAGE, Block
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.weights import store as weight_store
from hmc.runtime.weights.store import WeightStore
from hmc.runtime.weights.tensors import layout, tensor_groups

SIZE = 192 << 20

CHILD = """
import sys
from hmc.runtime.memory.shared import SharedBlock
block = SharedBlock.attach(int(sys.argv[1]), int(sys.argv[2]), "test")
print(int(block.array[::4096].sum(dtype=int)), flush=True)
sys.stdin.read()
"""


HUGE = ("AnonHugePages", "ShmemPmdMapped", "Private_Hugetlb", "Shared_Hugetlb")


def proportional_bytes(pids):
    """Memory that processes take together: each page counted once, shared ones among those who map
    them (the kernel's Pss; shared reserved huge pages, which Pss leaves out, once in all).
    """
    total = shared_huge = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        total += sizes["Pss"] + sizes["Private_Hugetlb"]
        shared_huge = max(shared_huge, sizes["Shared_Hugetlb"])
    return total + shared_huge


def huge_bytes(block):
    """How much of a block lies in huge pages now, as the kernel counts this process's mapping."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first < block.address + block.span and block.address < last
        elif inside and head[:-1] in HUGE:
            total += int(rest[0]) << 10
    return total


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_two_processes_have_one_copy():
    before, files = proportional_bytes([os.getpid()]), os.listdir("/dev/shm")
    block = SharedBlock(SIZE, "test")
    block.array[:] = 3
    alone = proportional_bytes([os.getpid()])
    assert alone - before > 0.9 * SIZE
    command = [sys.executable, "-c", CHILD, str(block.descriptor), str(SIZE)]
    with subprocess.Popen(
        command, stdin=-1, stdout=-1, pass_fds=[block.descriptor], text=True
    ) as child:
        assert int(child.stdout.readline()) == 3 * SIZE // 4096
        both = proportional_bytes([os.getpid(), child.pid])
        child.stdin.close()
    assert both - alone < SIZE / 2, "the child's interpreter, not its own copy"
    assert os.listdir("/dev/shm") == files
    block.close()
    assert proportional_bytes([os.getpid()]) - before < SIZE / 2


def test_attached_memory_is_the_same_and_what_is_read_only_stays_so():
    block = SharedBlock(5000, "test")
    assert block.address % HUGE_PAGE == 0 and not block.array.any()
    reader = SharedBlock.attach(block.descriptor, 5000, "reader")
    writer = SharedBlock.attach(block.descriptor, 5000, "writer", write=True)
    writer.array[4999] = 7
    assert block.array[4999] == reader.array[4999] == 7
    with pytest.raises(ValueError, match="read-only"):
        reader.array[0] = 1
    with pytest.raises(PermissionError):
        os.ftruncate(block.descriptor, 0)
    with pytest.raises(ExecutionError, match="are expected"):
        SharedBlock.attach(block.descriptor, 3 * HUGE_PAGE, "another size")
    with pytest.raises(ExecutionError, match="no memory file"):
        SharedBlock.attach(10**6, 5000, "nothing")
    block.close()  # the others keep it
    assert reader.array[4999] == 7
    reader.close(), writer.close()


def test_close_gives_back_under_living_views():
    gc.collect()  # what other tests have left
    count = descriptors()
    block = SharedBlock(SIZE, "test")
    block.array[:] = 1
    view, address = block.array[:], block.address
    used = proportional_bytes([os.getpid()])
    block.close()
    block.close()
    assert used - proportional_bytes([os.getpid()]) > 0.9 * SIZE
    assert not view[::4096].any() and ctypes.string_at(address, 1) == b"\0"
    assert descriptors() == count
    SharedBlock(100, "dropped")
    gc.collect()
    assert descriptors() == count


@pytest.mark.parametrize("kind", [Block, SharedBlock])
def test_pages_are_as_stated(kind):
    block = kind(8 * HUGE_PAGE, "test")
    block.array[:] = 1
    if block.pages == "normal":
        assert huge_bytes(block) == 0
    elif block.pages == "reserved":
        assert huge_bytes(block) == 8 * HUGE_PAGE
    setting = "enabled" if kind is Block else "shmem_enabled"
    if not detect.free_huge_pages():
        assert block.pages == ("advised" if detect.huge_by_advice(setting) else "normal")
    block.close()


def test_reserved_pages_are_taken_only_where_they_suffice(monkeypatch):
    asked = []
    plain = os.memfd_create
    monkeypatch.setattr(shared, "free_huge_pages", lambda: 2)
    monkeypatch.setattr(
        os, "memfd_create", lambda name, flags: (asked.append(flags), plain(name, flags))[1]
    )
    SharedBlock(3 * HUGE_PAGE, "too much").close()
    assert [bool(flags & os.MFD_HUGETLB) for flags in asked] == [False]
    asked.clear()
    block = SharedBlock(2 * HUGE_PAGE, "fits")
    # Where the pool is not really there, the kernel says so and normal pages are taken.
    assert bool(asked[0] & os.MFD_HUGETLB)
    assert (block.pages == "reserved") == (len(asked) == 1)
    block.array[:] = 1
    block.close()


def test_no_address_space_is_a_capacity_error():
    for kind in (Block, SharedBlock):
        with pytest.raises(CapacityError, match=r"far too much: .* GiB cannot be mapped"):
            kind(1 << 60, "far too much")


ATTACH = """
import sys
from hmc.plan.file import load
from hmc.runtime.weights.store import WeightStore
plan = load(sys.argv[1])
store = WeightStore.attach(plan, int(sys.argv[2]))
weight = plan.weights[0]
print(store.home, float(store.rows(weight.name, 0, 50).sum()), flush=True)
"""


def test_an_attached_store_has_the_same_weights(checkpoint, tmp_path):
    directory = checkpoint("deepseek_v3", "fp8")
    plan = hmc.compile(directory)
    store = WeightStore.open(plan, directory, home="shared")
    descriptor = store.arena.descriptor
    mapped = WeightStore.open(plan, directory)
    attached = WeightStore.attach(plan, descriptor)
    address, size = attached.arena.address, attached.arena.size
    assert address % HUGE_PAGE == 0 and size > attached.bytes
    assert attached.home == "shared" and mapped.arena is None
    for weight in plan.weights:
        for one, two in ((mapped.address, attached.address),):
            assert ctypes.string_at(one(weight.name), weight.planes[0].bytes) == ctypes.string_at(
                two(weight.name), weight.planes[0].bytes
            )
    assert np.array_equal(
        attached.expert_table(1) - attached.arena.address,
        store.expert_table(1) - store.arena.address,
    )
    save(plan, tmp_path / "p.hmp")
    found = subprocess.run(
        [sys.executable, "-c", ATTACH, str(tmp_path / "p.hmp"), str(descriptor)],
        pass_fds=[descriptor],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = float(mapped.rows(plan.weights[0].name, 0, 50).sum())
    assert found.stdout.split() == ["shared", str(expected)]
    store.close()
    assert ctypes.string_at(attached.address(plan.weights[0].name), 64)  # lives on
    attached.close(), mapped.close()


def test_only_a_filled_arena_of_these_weights_is_attached(checkpoint, monkeypatch):
    plan = hmc.compile(checkpoint("qwen3_moe", "fp8"), max_context=64)
    other = hmc.compile(checkpoint("qwen3_moe", "bf16"))
    longer = hmc.compile(checkpoint("qwen3_moe", "fp8"), max_context=128)
    store = WeightStore.open(plan, None, dummy=True, home="shared")
    assert store.home == "dummy"
    WeightStore.attach(longer, store.arena.descriptor).close()
    with pytest.raises(PlanMismatchError, match="other weights"):
        WeightStore.attach(other, store.arena.descriptor)
    real = WeightStore.open(plan, Path(plan.checkpoint.path), home="shared")
    assert WeightStore.attach(plan, real.arena.descriptor).home == "shared"
    empty = SharedBlock(store.arena.size, "test")
    with pytest.raises(ExecutionError, match="never filled"):
        WeightStore.attach(plan, empty.descriptor)
    with open(os.devnull) as file, pytest.raises(ExecutionError, match="no weight arena"):
        WeightStore.attach(plan, file.fileno())
    for each in (store, real, empty):
        each.close()


def test_what_does_not_fit_is_refused_before_it_is_touched(checkpoint, monkeypatch):
    directory = checkpoint("qwen3_moe", "fp8")
    plan = hmc.compile(directory)
    count = descriptors()
    monkeypatch.setattr(weight_store, "available_bytes", lambda: 10_000)
    monkeypatch.setattr(weight_store, "free_huge_pages", lambda: 0)
    with pytest.raises(CapacityError, match=r"shared weights: .* GiB are needed"):
        WeightStore.open(plan, directory, home="shared")
    assert descriptors() == count
    _, size = layout(tensor_groups(plan))
    monkeypatch.setattr(weight_store, "free_huge_pages", lambda: size // HUGE_PAGE + 2)
    WeightStore.open(plan, directory, home="shared").close()


def test_a_shard_that_shrinks_while_it_is_read_is_named(checkpoint, tmp_path, monkeypatch):
    for path in checkpoint("qwen3_moe", "fp8").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    plan = hmc.compile(tmp_path)
    shard = tmp_path / plan.checkpoint.shards[0].name
    count = descriptors()
    monkeypatch.setattr("hmc.runtime.weights.store.check_checkpoint", lambda plan, directory: None)
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ShardError, match=f"{shard.name}: ends at byte"):
        WeightStore.open(plan, tmp_path, home="shared")
    shard.unlink()
    with pytest.raises(ShardError, match="missing"):
        WeightStore.open(plan, tmp_path, home="shared")
    assert descriptors() == count
