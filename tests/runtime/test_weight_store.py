"""Weight homes: addresses hold the checkpoint's bytes, mismatches are named, dummies look like
weights.
"""

import ctypes
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from checkpoints import _unpack_int4
from safetensors.torch import load_file, save_file

import hmc
from hmc.errors import CapacityError, PlanMismatchError, ShardError, UsageError
from hmc.runtime.weights import dummy
from hmc.runtime.weights import store as weights
from hmc.runtime.weights.store import WeightStore
from hmc.runtime.weights.tensors import tensor_groups


def raw(address, size):
    return np.frombuffer(ctypes.string_at(address, size), np.uint8)


def stored(directory):
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def as_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint that a test may spoil, and its plan."""
    source = checkpoint("qwen3_moe", "fp8", shards=2)
    target = tmp_path / "copy"
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target, hmc.compile(target)


@pytest.mark.parametrize("home", ["mapped", "arena", "shared"])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_every_address_holds_the_checkpoint(checkpoint, home, scales):
    directory = checkpoint("deepseek_v3", "fp8", shards=2, scale_dtype=scales)
    plan, tensors = hmc.compile(directory), stored(directory)
    seen = []
    store = WeightStore.open(plan, directory, home=home, progress=lambda *x: seen.append(x))
    for weight in plan.weights:
        assert np.array_equal(
            raw(store.address(weight.name), weight.planes[0].bytes), as_bytes(tensors[weight.name])
        )
        if weight.planes[1:]:
            expected = tensors[weight.name + "_scale_inv"].float()
            found = raw(store.scale_address(weight.name), 4 * expected.numel()).view(np.float32)
            assert np.array_equal(found, expected.flatten().numpy())
        else:
            assert store.scale_address(weight.name) == 0
        if home != "mapped":
            assert store.address(weight.name) % 64 == 0
    for layer in {e.layer for e in plan.experts}:
        table = store.expert_table(layer)
        assert table.shape == (16, 6)
        for column, role in enumerate(("gate", "up", "down")):
            about = store.experts(layer, role)
            for expert in range(about.count):
                name = about.pattern.format(e=expert)
                address, scale = table[expert, 2 * column : 2 * column + 2]
                assert np.array_equal(
                    raw(int(address), about.planes[0].bytes), as_bytes(tensors[name])
                )
                expected = tensors[name + "_scale_inv"].float().flatten().numpy()
                found = raw(int(scale), expected.nbytes).view(np.float32)
                assert np.array_equal(found, expected)
    if home != "mapped":
        assert seen[-1][1] == seen[-1][2] >= store.bytes
    store.close()


def test_tensors_are_views(checkpoint):
    directory = checkpoint("qwen3_moe", "bf16")
    plan, tensors = hmc.compile(directory), stored(directory)
    store = WeightStore.open(plan, directory)
    for weight in plan.weights[:9]:
        (found,) = store.arrays(weight.name)
        assert np.array_equal(found, tensors[weight.name].view(torch.uint16).numpy())
        assert found.ctypes.data == store.address(weight.name)
    store.close()


@pytest.mark.parametrize("quant", ["fp8", "bf16", "int4", "f32"])
def test_rows_are_dequantised(checkpoint, quant):
    directory = checkpoint("deepseek_v3", quant)
    plan, tensors = hmc.compile(directory), stored(directory)
    store = WeightStore.open(plan, directory)
    name = next(w.name for w in plan.weights if "kv_b_proj" in w.name)
    if quant == "int4":
        base = name.removesuffix(".weight")
        expected = _unpack_int4(tensors[base + ".weight_packed"], tensors[base + ".weight_scale"])
    elif quant == "fp8":
        scale = tensors[name + "_scale_inv"].float()
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        rows, columns = tensors[name].shape
        expected = tensors[name].float() * spread[:rows, :columns]
    else:
        expected = tensors[name]
    found = store.rows(name, 57, 203)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.float()[57:203].numpy())
    store.close()


def test_another_config_is_refused(copy):
    directory, plan = copy
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "rope_theta": 5}))
    with pytest.raises(PlanMismatchError, match=r"config\.json: changed"):
        WeightStore.open(plan, directory)
    (directory / "config.json").unlink()
    with pytest.raises(PlanMismatchError, match=r"config\.json"):
        WeightStore.open(plan, directory)


def test_a_changed_header_is_refused(copy):
    directory, plan = copy
    path = directory / plan.checkpoint.shards[1].name
    tensors = load_file(path)
    first, second = sorted(tensors)[:2]
    swapped = {first: second, second: first}
    save_file({swapped.get(name, name): tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(PlanMismatchError, match=path.name):
        WeightStore.open(plan, directory)


def test_a_cut_or_missing_shard_is_refused(copy):
    directory, plan = copy
    path = directory / plan.checkpoint.shards[0].name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PlanMismatchError, match=f"{path.name}: has"):
        WeightStore.open(plan, directory)
    path.unlink()
    with pytest.raises(ShardError, match=f"{path.name}.*missing"):
        WeightStore.open(plan, directory)


def test_no_weights_at_all(checkpoint, tmp_path):
    plan = hmc.compile(checkpoint("mixtral", "fp8"), dummy_weights=True)
    with pytest.raises(UsageError, match="dummy"):
        WeightStore.open(plan, tmp_path)
    with pytest.raises(UsageError, match="no checkpoint directory"):
        WeightStore.open(hmc.compile(checkpoint("mixtral", "fp8")), None)


@pytest.mark.parametrize("quant", ["fp8", "bf16", "int4"])
def test_dummies_look_like_weights(checkpoint, quant, monkeypatch):
    monkeypatch.setattr(dummy, "_PATTERN", 1 << 18)
    plan = hmc.compile(checkpoint("deepseek_v3", quant), dummy_weights=True)
    store = WeightStore.open(plan, None, dummy=True)
    again = WeightStore.open(plan, None, dummy=True)
    for weight in plan.weights:
        if len(weight.shape) != 2:
            values = store.vector(weight.name)
            assert ((values > 0.5) & (values < 1.5)).all()
            continue
        values = store.rows(weight.name, 0, weight.shape[0])
        assert np.isfinite(values).all()
        assert abs(float(values.std()) * weight.shape[1] ** 0.5 - 1) < 0.15, weight
        assert abs(float(values.mean())) < 0.2 * float(values.std())
        if weight.format == "fp8":
            assert (store.arrays(weight.name)[0] & 127).max() > 0x79  # of 288
    one, two = store.experts(1, "gate"), store.expert_table(1)
    first, second = (raw(int(two[e, 0]), one.planes[0].bytes) for e in (0, 1))
    assert not np.array_equal(first, second)
    other = raw(int(again.expert_table(1)[0, 0]), one.planes[0].bytes)
    assert np.array_equal(first, other)
    store.close(), again.close()


def test_dummies_that_do_not_fit_are_refused(checkpoint, monkeypatch):
    plan = hmc.compile(checkpoint("mixtral", "fp8"), dummy_weights=True)
    monkeypatch.setattr(weights, "available_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match=r"dummy weights: .* GiB are needed"):
        WeightStore.open(plan, None, dummy=True)


def test_groups_cover_every_byte_of_the_checkpoint(checkpoint):
    directory = checkpoint("qwen3_moe", "fp8", shards=2)
    plan = hmc.compile(directory)
    spans = [
        (int(shard), int(offset), int(offset) + group.form.stored_bytes)
        for group in tensor_groups(plan)
        for shard, offset in zip(group.shards, group.offsets, strict=True)
    ]
    for number, shard in enumerate(plan.checkpoint.shards):
        mine = sorted((a, b) for s, a, b in spans if s == number)
        assert mine[0][0] == shard.header_bytes
        assert mine[-1][1] == shard.size
        assert all(before[1] == after[0] for before, after in pairwise(mine))
