"""A small cache: requests grow block by block, those that came last make room for the others and go
on as if nothing had been; and every request ends, whatever arrives, is cancelled or takes too long.
"""

import os
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_fake import BLOCK, VOCAB, WAIT, PagedFake, prompts, reference, request, tokens_of

from hmc.errors import CapacityError, QueueFullError, RequestTimeoutError
from hmc.runtime.batching.scheduler import Scheduler

REQUESTS = int(os.environ.get("HMC_TEST_REQUESTS", "300"))
EXAMPLES = max(30, REQUESTS // 10)


def test_requests_share_a_cache_that_could_not_hold_all_they_may_become():
    fake = PagedFake(batch=8, capacity=64)
    scheduler, heads = Scheduler(fake), range(2, 10)
    tickets = [scheduler.submit(request([n, 5, 6], 60, eos=())) for n in heads]
    scheduler.start()
    assert [tokens_of(t) for t in tickets] == [reference([n, 5, 6], 60, ()) for n in heads]
    scheduler.close()
    stats = scheduler.stats()
    together = max(count for phase, count in fake.calls if phase == "decode")
    assert together >= 4  # though each may need the whole cache
    assert stats.preemptions > 0 and stats.tokens_generated == 8 * 60
    assert (stats.kv_used, fake.kv.rows_free) == (0, 8)
    fake.close()


def test_the_oldest_never_makes_room():
    fake = PagedFake(batch=4, capacity=64)
    ends = []
    scheduler = Scheduler(fake)
    for name in range(6):
        listener = lambda update, name=name: update.finish_reason and ends.append(name)  # noqa: E731
        scheduler.submit(request([name + 2] * 9, 40, eos=(), listener=listener))
    scheduler.start()
    assert scheduler.drain(WAIT)
    scheduler.close()
    assert scheduler.stats().preemptions > 0
    assert ends == sorted(ends)
    fake.close()


def test_what_a_request_had_is_found_again_as_far_as_nobody_needed_it():
    fake = PagedFake(batch=4, capacity=64)
    scheduler = Scheduler(fake)
    first = scheduler.submit(request([2] * 5, 55, eos=()))
    second = scheduler.submit(request([3] * 5, 30, eos=()))
    scheduler.start()
    assert tokens_of(first) == reference([2] * 5, 55, ())
    assert tokens_of(second) == reference([3] * 5, 30, ())
    scheduler.close()
    stats = scheduler.stats()
    assert stats.preemptions >= 1
    assert stats.tokens_restored < 30  # not from the beginning again and again
    fake.close()


def test_sampler_and_mask_go_on_after_a_request_made_room():
    def mask(generated):
        seen.append(len(generated))
        allowed = np.ones(VOCAB, bool)
        allowed[len(generated) % 7 :: 7] = False
        return allowed

    sampling = {"temperature": 1.5, "seed": 4, "repetition_penalty": 1.3, "frequency_penalty": 0.5}
    answers, counts = [], []
    for capacity in (256, 64):
        seen = []
        fake = PagedFake(batch=4, capacity=capacity)
        scheduler = Scheduler(fake)
        scheduler.submit(request([2] * 5, 55, eos=()))
        ticket = scheduler.submit(request([3] * 5, 50, eos=(), mask=mask, sampling=sampling))
        scheduler.start()
        answers.append(tokens_of(ticket))
        counts.append(scheduler.stats().preemptions)
        assert seen == list(range(50))
        scheduler.close()
        fake.close()
    assert answers[0] == answers[1]
    assert counts[0] == 0 < counts[1]


def test_scores_of_a_prompt_are_told_once_though_it_made_room():
    fake = PagedFake(batch=4, capacity=64, chunk=8)
    updates = []
    scheduler = Scheduler(fake)
    scheduler.submit(request([2] * 20, 40, eos=()))
    scored = request([3] * 36, 9, eos=(), logprobs=0, prompt_logprobs=True)
    scored.listener = updates.append
    ticket = scheduler.submit(scored)
    scheduler.start()
    assert tokens_of(ticket) == reference([3] * 36, 9, ())
    assert [entry.token for entry in updates[0].prompt_logprobs] == [3] * 35
    assert all(update.prompt_logprobs is None for update in updates[1:])
    assert scheduler.stats().preemptions > 0
    scheduler.close()
    fake.close()


def test_a_short_prompt_does_not_wait_for_a_long_one():
    fake = PagedFake(context=640, capacity=1280, chunk=16)
    gate, at = fake.gate, {}
    scheduler = Scheduler(fake)

    def first(name):
        return lambda update: at.setdefault(name, len(fake.calls))

    gate.clear()
    long = scheduler.submit(request([5] * 600, 1, listener=first("long")))
    scheduler.start()
    while not fake.calls:
        time.sleep(0.001)
    short = scheduler.submit(request([7, 8], 1, listener=first("short")))
    gate.set()
    assert short.wait(WAIT) and long.wait(WAIT)
    assert at["short"] == 2  # after the chunk that was under way
    assert at["long"] == 600 // 16 + 2
    scheduler.close()
    fake.close()


def test_short_prompts_without_end_do_not_stop_a_long_one():
    fake = PagedFake(batch=8, context=640, capacity=1280, chunk=16)
    scheduler = Scheduler(fake, max_queue=400)
    began = []
    long = scheduler.submit(
        request([5] * 600, 1, listener=lambda update: began.append(len(fake.calls)))
    )
    short = [scheduler.submit(request([n % 40 + 2, n // 40 + 2], 1)) for n in range(300)]
    scheduler.start()
    assert long.wait(WAIT) and all(ticket.wait(WAIT) for ticket in short)
    assert began[0] <= 2 * -(-600 // 16)
    scheduler.close()
    fake.close()


def test_requests_that_need_little_pass_one_without_room_but_not_for_ever():
    fake = PagedFake(batch=8, capacity=64)
    ends = []

    def ended(name):
        return lambda update: update.finish_reason and ends.append(name)

    scheduler = Scheduler(fake, max_queue=100)
    sizes = {"held": (30, 30), "large": (50, 1)} | {f"small{n}": (3, 1) for n in range(20)}
    tickets = [
        scheduler.submit(request([2] * size, new, eos=(), listener=ended(name)))
        for name, (size, new) in sizes.items()
    ]
    scheduler.start()
    assert all(ticket.wait(WAIT) for ticket in tickets)
    assert ends.index("held") == 8  # so many have passed "large"
    scheduler.close()
    fake.close()


def test_a_request_that_takes_too_long_ends_with_an_error_wherever_it_is():
    fake = PagedFake(capacity=128)
    fake.gate.clear()
    scheduler = Scheduler(fake, request_seconds=0.05)
    tickets = [scheduler.submit(request([n] * 40, 5)) for n in range(2, 9)]
    scheduler.start()
    time.sleep(0.06)
    fake.gate.set()
    for ticket in tickets:
        with pytest.raises(RequestTimeoutError, match=r"longer than the 0.05 s .* 0 tokens"):
            tokens_of(ticket)
    assert scheduler.stats().finished == {"error": 7}
    assert fake.kv.allocator.used == 0
    assert scheduler.failure is None
    scheduler.close()
    fake.close()


def test_places_are_held_before_anything_is_prepared():
    fake = PagedFake()
    scheduler = Scheduler(fake, max_queue=3)
    with scheduler.places(2):
        ticket = scheduler.submit(request([2]))
        with pytest.raises(QueueFullError, match="3 requests wait already, of 3 allowed"):
            scheduler.submit(request([3]))
        with pytest.raises(QueueFullError), scheduler.places(1):
            raise AssertionError("no place")
        other = scheduler.submit(request([3]), held=True)
    scheduler.start()
    assert tokens_of(ticket) == reference([2], 8) and tokens_of(other) == reference([3], 8)
    scheduler.close()
    fake.close()


def test_blocks_that_somebody_else_holds_end_the_last_request_with_an_error():
    fake = PagedFake(capacity=64)
    fake.kv.reserve(held := fake.open(), 40)
    with Scheduler(fake) as scheduler:
        ticket = scheduler.submit(request([2] * 5, 40, eos=()))
        with pytest.raises(CapacityError, match="somebody else"):
            tokens_of(ticket)
        assert tokens_of(scheduler.submit(request([2] * 5, 4, eos=()))) == reference([2] * 5, 4, ())
    fake.release(held)
    assert fake.kv.allocator.used == 0
    fake.close()


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 8),
    blocks=st.integers(16, 40),
    chunk=st.integers(1, 20),
    early=st.booleans(),
)
def test_any_arrivals_lengths_and_cancellations_against_a_small_cache(
    seed, batch, blocks, chunk, early
):
    rng = random.Random(seed)
    fake = PagedFake(batch=batch, capacity=blocks * BLOCK, chunk=chunk)
    made = prompts(12, 50, VOCAB, seed)
    accepted = []
    with Scheduler(fake, max_queue=100) as scheduler:
        for _ in range(rng.randrange(1, 30)):
            ids, new = rng.choice(made), rng.randrange(1, 60)
            if early:
                fake.gate.clear()
            accepted.append((scheduler.submit(request(ids, new)), ids, new))
            if rng.random() < 0.3:
                rng.choice(accepted)[0].cancel()
            fake.gate.set()
        for ticket, ids, new in accepted:
            tokens, expected = tokens_of(ticket), reference(ids, min(new, 65 - len(ids)))
            cancelled = ticket.result().finish_reason == "cancelled"
            assert tokens == (expected[: len(tokens)] if cancelled else expected)
    assert fake.kv.allocator.used == 0 and fake.kv.rows_free == batch
    fake.close()


def test_many_streams_and_hundreds_of_requests_with_disconnects():
    """64 at once over a cache for ten of them."""
    fake = PagedFake(batch=64, capacity=640, chunk=256)
    rng, made = random.Random(REQUESTS), prompts(80, 60, VOCAB)
    accepted = []
    with Scheduler(fake, max_queue=REQUESTS) as scheduler:
        for _ in range(REQUESTS):
            ids, new = rng.choice(made), rng.randrange(1, 64)
            accepted.append((scheduler.submit(request(ids, new, eos=())), ids, new))
            if rng.random() < 0.25:
                rng.choice(accepted[-64:])[0].cancel()
        finished = {"length": 0, "cancelled": 0}
        for ticket, ids, new in accepted:
            tokens, expected = tokens_of(ticket), reference(ids, min(new, 65 - len(ids)), ())
            reason = ticket.result().finish_reason
            finished[reason] += 1
            assert tokens == (expected[: len(tokens)] if reason == "cancelled" else expected)
        stats = scheduler.stats()
    assert stats.finished == {reason: number for reason, number in finished.items() if number}
    assert stats.preemptions > 0
    assert max(count for phase, count in fake.calls if phase == "decode") > 16
    assert (stats.running, stats.prefilling, stats.waiting, stats.kv_used) == (0, 0, 0, 0)
    assert fake.kv.allocator.used == 0 and fake.kv.rows_free == 64
    fake.close()
