"""The paged cache: no block lost, none owned twice, room named when it runs out."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import keys_and_values, layout

from hmc.errors import CapacityError, ExecutionError, VerifyError
from hmc.ops import OPS, State
from hmc.plan import KVLayout, state_groups
from hmc.runtime.memory.allocator import BlockAllocator
from hmc.runtime.memory.kv import KVCache


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_allocator_never_shares_or_loses_a_block(moves):
    allocator, held = BlockAllocator(23), []
    for take, number in moves:
        if take:
            try:
                held.append(allocator.take(number))
            except CapacityError:
                assert number > allocator.available
        elif held:
            allocator.give_back(held.pop(number % len(held)))
        owned = [block for blocks in held for block in blocks]
        assert len(owned) == len(set(owned)) == allocator.used
        assert allocator.available + allocator.used == 23
        assert all(0 <= block < 23 for block in owned)
    for blocks in held:
        allocator.give_back(blocks)
    assert sorted(allocator.take(23)) == list(range(23))


def test_double_free_is_an_error_and_frees_nothing():
    allocator = BlockAllocator(4)
    first, second = allocator.take(2)
    allocator.give_back([first])
    for wrong in ([second, first], [second, second], [9], [-1]):
        with pytest.raises(ExecutionError, match="not owned"):
            allocator.give_back(wrong)
    assert allocator.used == 1


def cache(*states, capacity=64, sequences=3, context=48, **options):
    states = states or keys_and_values(6, 4)
    sizes = {"block": 16, "tokens": capacity, "sequences": sequences, "layers": (0, 2)}
    return KVCache(layout(*states, **{**sizes, **options}), context)


def test_reserve_release_and_tables():
    kv = cache()
    assert kv.capacity_tokens == 64
    one, two = kv.open(), kv.open()
    kv.reserve(one, 17)
    one.length = 17
    kv.reserve(one, 15)
    assert len(one.blocks) == 2
    kv.reserve(two, 32)
    assert kv.allocator.available == 0
    assert kv.tables[one.row, :2].tolist() == one.blocks
    with pytest.raises(CapacityError, match="16 tokens asked for, 0 of 64 free"):
        kv.reserve(one, 16)
    assert len(one.blocks) == 2
    kv.release(two)
    kv.reserve(one, 16)
    with pytest.raises(CapacityError, match="exceeds the 48"):
        kv.reserve(one, 32)
    kv.release(one)
    assert kv.allocator.used == 0
    with pytest.raises(ExecutionError, match="twice"):
        kv.release(one)
    kv.close()


def test_rows_run_out():
    kv = cache(sequences=2)
    kv.open(), kv.open()
    with pytest.raises(CapacityError, match="2 sequences"):
        kv.open()


def test_tensors_are_views_at_the_addresses_and_do_not_overlap():
    kv = cache(capacity=48)
    for layer in (0, 2):
        for part, (heads, width) in enumerate(((2, 6), (2, 4))):
            view = kv.array(layer, "kv"[part], heads)
            assert view.shape == (3, heads, 16, width // heads)
            view[:] = np.array(10 * layer + part + 1, np.float32).view(np.uint32) >> 16
    for layer in (0, 2):
        for part, width in enumerate((6, 4)):
            raw = ctypes.string_at(kv.address(layer, "kv"[part]), 2 * 3 * 16 * width)
            values = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).float().numpy()
            assert np.array_equal(values, np.full(3 * 16 * width, 10.0 * layer + part + 1))
    assert kv.layout.bytes_per_token == 2 * 10 * 2
    kv.close()


def test_layers_that_differ_and_states_a_sequence():
    kept = [(0, keys_and_values(6, 4)), (2, [State("s", 5, "sequence", "f32")]), (1, [])]
    kept += [(0, [State("conv", 3, "sequence")]), (5, [State("latent", 7)])]
    unlike = KVLayout(
        block=16, capacity_tokens=48, sequences=2, snapshots=1, groups=state_groups(kept)
    )
    assert unlike.layers == (0, 2, 5)
    assert (unlike.bytes_per_token, unlike.bytes_per_sequence) == (2 * 17, 6 + 20)
    kv = KVCache(unlike, 48)
    assert kv.array(0, "k", 2).shape == (3, 2, 16, 3) and kv.array(5, "latent").dtype == np.uint16
    assert kv.array(2, "s").shape == (3, 5) and kv.array(2, "s").dtype == np.float32
    for number, (layer, state) in enumerate(unlike.each()):
        kv.array(layer, state.name)[:] = number + 1
    for number, (layer, state) in enumerate(unlike.each()):
        assert (kv.array(layer, state.name) == number + 1).all()
    row = kv.open().row
    assert (kv.array(2, "s")[row] == 0).all() and (kv.array(2, "s")[1 - row] == 4).all()
    with pytest.raises(KeyError, match="layer 5 keeps no state k"):
        kv.array(5, "k")
    kv.close()


def test_a_layers_states_have_names_of_their_own():
    with pytest.raises(VerifyError, match="layer 3 keeps two states named k"):
        state_groups([(3, [State("k", 4)]), (3, [State("k", 5)])])


def test_attention_says_how_far_back_it_reads():
    sizes = {"kv_heads": 2, "head_dim": 8, "v_dim": 4}
    for extra, window in (({}, 0), ({"window": 32}, 32), ({"chunk": 16}, 16)):
        key, value = OPS["attention"].states(sizes | extra)
        assert (key.width, value.width, key.window, value.window) == (16, 8, window, window)
