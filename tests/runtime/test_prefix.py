"""Prefix reuse: what is found is what was stored, nothing is lost or taken too early, and shared
blocks are never written."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import keys_and_values, layout

from hmc.errors import CapacityError, ExecutionError
from hmc.ops import State
from hmc.plan import Stop
from hmc.runtime.memory.allocator import BlockAllocator
from hmc.runtime.memory.kv import KVCache
from hmc.runtime.memory.prefix import PrefixIndex
from hmc.runtime.memory.snapshots import Snapshots

BLOCK = 2


def ids(*tokens):
    return np.array(tokens, np.int32)


SUM = State("sum", 1, "sequence", "f32")


def cache(blocks=8, sequences=4, context=12, snapshots=None):
    """With room for some `snapshots`, layers keep a state a sequence beside keys and values."""
    states, sizes = keys_and_values(1, 1), {"tokens": blocks * BLOCK, "sequences": sequences}
    if snapshots is not None:
        states, sizes = (*states, SUM), {**sizes, "snapshots": snapshots}
    return KVCache(layout(*states, block=BLOCK, layers=(0, 1), **sizes), context)


def advance(kv, sequence, tokens):
    """Change the state of a sequence as the op of a layer would, depending on every token."""
    for layer in (0, 1):
        state = kv.array(layer, "sum")[sequence.row]
        for token in tokens:
            state[:] = state / 2 + token + 1 + layer


def state_of(tokens, layer):
    state = np.float32(0)
    for token in tokens:
        state = state / 2 + token + 1 + layer
    return state


def assert_state(kv, sequence, tokens):
    for layer in (0, 1):
        assert kv.array(layer, "sum")[sequence.row] == state_of(tokens, layer)


def prefilled(kv, prompt):
    """A sequence that holds the prompt, and how many of its tokens were there before."""
    sequence = kv.open()
    found = kv.adopt(sequence, prompt)
    kv.reserve(sequence, len(prompt) - found)
    sequence.length = len(prompt)
    kv.keep(sequence, prompt)
    return sequence, found


def test_index_follows_the_chain_and_compares_tokens():
    index = PrefixIndex(BLOCK)
    assert index.add([5, 3], 0, ids(1, 2, 3, 4))
    assert index.add([5, 3], 1, ids(1, 2, 3, 4))
    assert index.match(ids(1, 2, 3, 4, 9), 9) == [5, 3]
    assert index.match(ids(1, 2, 3, 4), 1) == [5]
    assert index.match(ids(1, 2, 3), 9) == [5]
    assert index.match(ids(3, 4, 3, 4), 9) == []
    assert index.match(ids(1, 2, 9, 4), 9) == [5]
    assert not index.add([7], 0, ids(1, 2))
    assert index.add([5, 3], 1, ids(1, 2, 3, 4))
    index.forget(3)
    assert index.match(ids(1, 2, 3, 4), 9) == [5]


def test_a_prompt_is_found_again_but_for_its_last_token():
    kv = cache()
    first, found = prefilled(kv, ids(1, 2, 3, 4, 5))
    assert found == 0
    blocks = list(first.blocks)
    kv.release(first)
    assert (kv.allocator.used, kv.allocator.cached, kv.allocator.available) == (0, 2, 8)
    again, found = prefilled(kv, ids(1, 2, 3, 4))
    assert found == 2  # the second block would leave nothing to compute
    assert again.blocks[0] == blocks[0] and again.blocks[1] != blocks[1]
    longer, found = prefilled(kv, ids(1, 2, 3, 4, 5, 6))
    assert found == 4
    assert longer.blocks[:2] == blocks[:2]
    assert kv.tables[longer.row, :3].tolist() == longer.blocks
    assert kv.allocator.used == 4  # the first block is shared by two
    kv.release(again)
    kv.release(longer)
    assert kv.allocator.used == 0
    kv.close()


def test_only_prompt_blocks_are_kept():
    kv = cache()
    sequence, _ = prefilled(kv, ids(1, 2, 3))
    kv.reserve(sequence, 3)
    sequence.length = 6  # decoded tokens complete the second block and fill a third
    kv.keep(sequence, ids(1, 2, 3))
    kv.release(sequence)
    assert (kv.allocator.cached, kv.allocator.available) == (1, 8)
    kv.close()


def test_the_least_recently_used_chain_goes_first_and_from_its_end():
    kv = cache(blocks=4, context=8)
    for prompt in (ids(1, 2, 3, 4), ids(5, 6, 7, 8)):
        kv.release(prefilled(kv, prompt)[0])
    kv.release(prefilled(kv, ids(9))[0])  # takes the end of the oldest chain
    kv.release(prefilled(kv, ids(1, 2, 9))[0])  # touches its beginning
    kv.release(prefilled(kv, ids(7, 7, 7))[0])  # two blocks: the free one, and the oldest
    assert kv.adopt(kv.open(), ids(1, 2, 3, 4, 0)) == 2
    assert kv.adopt(kv.open(), ids(5, 6, 7, 8, 0)) == 2
    kv.close()


def test_room_counts_what_is_cached_but_not_what_is_adopted():
    kv = cache(blocks=3, context=12)
    kv.release(prefilled(kv, ids(1, 2, 3, 4, 5))[0])
    sequence = kv.open()
    assert kv.adopt(sequence, ids(1, 2, 3, 4, 5)) == 4
    with pytest.raises(CapacityError, match="4 tokens asked for, 2 of 6 free"):
        kv.reserve(sequence, 3)
    kv.reserve(sequence, 2)
    with pytest.raises(ExecutionError, match="not empty"):
        kv.adopt(sequence, ids(1, 2))
    kv.release(sequence)
    whole = kv.open()
    kv.reserve(whole, 6)
    assert (kv.allocator.used, kv.allocator.cached) == (3, 0)
    kv.close()


def test_shares_are_checked():
    allocator = BlockAllocator(3)
    (block,) = allocator.take(1)
    allocator.share([block])
    allocator.give_back([block])
    assert allocator.used == 1
    allocator.give_back([block])
    assert allocator.used == 0
    for wrong in (allocator.give_back, allocator.share):
        with pytest.raises(ExecutionError, match=r"not owned|shared but free"):
            wrong([block])
    with pytest.raises(ExecutionError, match="not owned"):
        allocator.keep(block)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=10)
MOVES = st.one_of(
    st.tuples(st.just("prefill"), PROMPTS),
    st.tuples(st.just("decode"), st.integers(0, 9)),
    st.tuples(st.just("release"), st.integers(0, 9)),
)


def test_states_of_a_prompt_are_kept_and_restored():
    kv = cache(snapshots=2)

    def prefill(prompt):
        sequence = kv.open()
        found = kv.adopt(sequence, ids(*prompt))
        kv.reserve(sequence, len(prompt) - found)
        for at in range(found, len(prompt), BLOCK):
            part = prompt[at : at + BLOCK]
            advance(kv, sequence, part)
            sequence.length += len(part)
            kv.keep(sequence, ids(*prompt))
        assert_state(kv, sequence, prompt)
        kv.release(sequence)
        return found

    assert prefill((1, 2, 3, 4, 5)) == 0
    assert len(kv.snapshots) == 1  # after the last block
    assert prefill((1, 2, 3, 4, 6)) == 4
    assert prefill((1, 2, 9)) == 0
    assert prefill((1, 2, 8)) == 2  # where the one before left what was known
    assert prefill((7, 8, 9)) == 0  # its states take the place of those used longest ago
    assert prefill((1, 2, 3, 4, 7)) == 2  # the second block is there, its states are not
    assert prefill((1, 2, 3, 4, 7)) == 4  # and were kept again, for the block that was known
    kv.close()


def test_snapshots_are_wanted_at_the_end_and_ever_further_from_it():
    kept = cache(blocks=200, context=400, snapshots=9).layout
    assert kept.stops(0, 2) == ()
    assert kept.stops(0, 4) == (Stop(2, sparse=False),)
    ends = [(2 * page, True) for page in (36, 68, 84, 92)] + [(200, False)]
    assert kept.stops(0, 202) == tuple(ends)  # the 101st block would leave nothing to compute
    assert kept.stops(0, 201, known=21) == ((20, False), *ends)
    assert kept.stops(0, 201, known=168) == (*ends[:2], (168, False), *ends[3:])
    assert kept.stops(168, 201) == tuple(ends[3:])
    assert kept.stops(0, 4, known=400) == (Stop(2, sparse=False),)
    assert cache(snapshots=0).layout.stops(0, 20) == cache().layout.stops(0, 20) == ()


def test_a_long_prompt_leaves_others_their_snapshots():
    copied = []
    kept = Snapshots(range(3), lambda *copy: copied.append(copy))
    for page in (1, 2):
        kept.keep(page, 9, page)
    for page in (11, 12, 13):
        kept.keep(page, 9, page, sparse=True)
    assert [page for page in (1, 2, 11, 12, 13) if page in kept] == [1, 2, 13]
    kept.restore(13, 8, 13)  # it is worth as much as others now
    assert copied[-1] == (2, 8, 13)
    kept.keep(14, 9, 14, sparse=True)
    assert 14 not in kept and kept.take(sparse=True) is None
    kept.keep(15, 9, 15)
    assert [page for page in (1, 2, 13, 15) if page in kept] == [2, 13, 15]
    slot = kept.take(sparse=False)
    assert (len(kept), kept.free, 2 in kept) == (2, 0, False)
    kept.put(13, slot, sparse=False)  # is kept already
    assert (len(kept), kept.free) == (2, 1)
    kept.forget(13), kept.forget(14)
    assert (len(kept), kept.free) == (1, 2)


def test_slots_are_lent_to_who_computes_a_prompt_elsewhere():
    kv = cache(blocks=60, context=120, snapshots=3)
    prompt = ids(*range(101))
    sequence = kv.open()
    kv.adopt(sequence, prompt)
    kv.reserve(sequence, 101)
    kv.lend(sequence)
    kv.lend(sequence)  # again, before anybody has begun
    assert [stop.tokens for stop in sequence.lent] == [100, 84, 68] and kv.snapshots.free == 0
    for at in (36, 68, 84, 101):
        advance(kv, sequence, prompt[sequence.length : at].tolist())
        sequence.length = at
        if at == 68:
            kv.copy(sequence.row, sequence.lent[Stop(68, sparse=True)], at)
        kv.keep(sequence, prompt[:101]) if at < 101 else kv.settle(sequence)
    assert (len(kv.snapshots), kv.snapshots.free) == (2, 1)  # that after 100 tokens never came
    kv.release(sequence)
    other = kv.open()
    assert kv.adopt(other, ids(*range(70))) == 68
    assert_state(kv, other, range(68))
    lost = kv.open()
    kv.adopt(lost, ids(*range(200, 210)))
    kv.lend(lost)
    assert kv.snapshots.free == 0
    kv.release(lost)
    assert (len(kv.snapshots), kv.snapshots.free) == (2, 1)
    kv.close()


class Followed:
    """What a device is told of its slots."""

    def __init__(self):
        self.told = []

    def clear(self, slot):
        self.told.append(slot)

    def copy(self, source, target):
        self.told.append((source, target))


def test_a_device_follows_with_its_own_slots():
    kv, device = cache(snapshots=1), Followed()
    kv.attach(device)
    sequence = kv.open()
    kv.adopt(sequence, ids(1, 2, 9))
    kv.reserve(sequence, 2)
    sequence.length = 2
    kv.keep(sequence, ids(1, 2, 9))
    other = kv.open()
    assert kv.adopt(other, ids(1, 2, 3)) == 2
    assert device.told == [sequence.row, (sequence.row, 4), other.row, (4, other.row)]
    kv.detach(device)
    kv.open()
    assert len(device.told) == 4
    kv.close()


@pytest.mark.parametrize("snapshots", [None, 0, 1, 3])
@settings(max_examples=100, deadline=None)
@given(moves=st.lists(MOVES, max_size=60))
def test_any_history_keeps_every_sequence_intact(snapshots, moves):
    """Sequences' tokens, written through the block tables, are read back whole after every move,
    and their states are those of their tokens."""
    kv = cache(blocks=9, sequences=3, context=14, snapshots=snapshots)
    stored = np.full((kv.allocator.count, BLOCK), -1)
    held = {}

    def write(sequence, token):
        block, place = divmod(sequence.length, BLOCK)
        stored[kv.tables[sequence.row, block], place] = token
        sequence.length += 1
        if snapshots is not None:
            advance(kv, sequence, [token])

    for what, value in moves:
        if what == "prefill" and kv.rows_free:
            prompt = np.array(value, np.int32)
            sequence = kv.open()
            found = kv.adopt(sequence, prompt)
            assert found < len(prompt) and found % BLOCK == 0
            try:
                kv.reserve(sequence, len(prompt) - found)
            except CapacityError:
                kv.release(sequence)
                continue
            for token in value[found:]:
                write(sequence, token)
                if sequence.length % (2 * BLOCK) == 0:
                    kv.keep(sequence, prompt)
            kv.keep(sequence, prompt)
            held[sequence] = list(value)
        elif what != "prefill" and held:
            sequence = list(held)[value % len(held)]
            if what == "release":
                kv.release(sequence)
                del held[sequence]
            elif sequence.length < 14:
                try:
                    kv.reserve(sequence, 1)
                except CapacityError:
                    continue
                write(sequence, 7)
                held[sequence].append(7)
        for sequence, tokens in held.items():
            blocks = kv.tables[sequence.row, : len(sequence.blocks)]
            assert blocks.tolist() == sequence.blocks
            assert stored[blocks].reshape(-1)[: len(tokens)].tolist() == tokens
            if snapshots is not None:
                assert_state(kv, sequence, tokens)
        allocator = kv.allocator
        owned = {block for sequence in held for block in sequence.blocks}
        assert allocator.used == len(owned)
        assert allocator.available + allocator.used == allocator.count
    for sequence in held:
        kv.release(sequence)
    assert kv.allocator.used == 0
    whole = kv.allocator.take(9)
    assert sorted(whole) == list(range(9))  # cached or not, every block can be had
    kv.close()
