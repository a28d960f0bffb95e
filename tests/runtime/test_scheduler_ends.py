"""Every request ends, alone or with all others, whatever is cancelled, breaks, hangs or closes; and
gives back its blocks.
"""

import random
import threading
import time

import pytest
from paged_fake import VOCAB, WAIT, PagedFake, prompts, reference, request, tokens_of

from hmc.errors import ExecutionError, QueueFullError, WorkerError
from hmc.runtime.batching.scheduler import Scheduler


@pytest.fixture
def fake(request: pytest.FixtureRequest):
    fake = PagedFake(**getattr(request, "param", {}))
    yield fake
    fake.gate.set()
    fake.close()


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(
    ("fake", "count"),
    [
        ({}, 2000),
        ({"snapshots": 5}, 150),
        ({"snapshots": 0}, 100),
        pytest.param({"snapshots": 5}, 2000, marks=pytest.mark.slow),
    ],
    indirect=["fake"],
)
def test_a_storm_of_cancellations_leaves_nothing_behind(fake, prefix_cache, count, monkeypatch):
    rng = random.Random(count)
    made = prompts(60, 40, VOCAB)
    finished = dict.fromkeys(("stop", "length", "cancelled"), 0)
    accepted = []
    if not prefix_cache:
        monkeypatch.setattr(fake.kv, "adopt", lambda *_: 0)
    with Scheduler(fake, max_queue=20) as scheduler:
        for number in range(count):
            ids, new = rng.choice(made), rng.randrange(1, 25)
            cancelling = number % 3 == 0
            while True:
                if cancelling:  # nothing begins until it is cancelled, however slow this thread is
                    fake.gate.clear()
                try:
                    ticket = scheduler.submit(request(ids, new))
                    break
                except QueueFullError:
                    fake.gate.set()
                    accepted[-rng.randrange(1, 20)][0].wait(WAIT)
            accepted.append((ticket, ids, new))
            if cancelling:
                rng.choice([given for given, _, _ in accepted[-30:] if not given.done]).cancel()
                fake.gate.set()
        for ticket, ids, new in accepted:
            tokens = tokens_of(ticket)
            reason = ticket.result().finish_reason
            finished[reason] += 1
            expected = reference(ids, new)
            assert tokens == (expected[: len(tokens)] if reason == "cancelled" else expected)
        stats = scheduler.stats()
    assert stats.finished == {reason: number for reason, number in finished.items() if number}
    assert finished["cancelled"] > count // 20 and finished["length"] > count // 10
    assert (stats.running, stats.prefilling, stats.waiting, stats.kv_used) == (0, 0, 0, 0)
    assert fake.kv.allocator.used == 0 and fake.kv.rows_free == 4
    kept = fake.kv.snapshots
    assert len(kept) + kept.free == fake.kv.layout.snapshots
    reused = prefix_cache and (fake.states is None or fake.kv.layout.snapshots > 0)
    assert (stats.prefix_hits > 0) == reused


def test_cancelling_works_queued_in_prefill_and_in_decode(fake):
    scheduler = Scheduler(fake)
    fake.gate.clear()
    prefilling, begun, *queued = (
        scheduler.submit(request(range(first, first + 40))) for first in range(2, 8)
    )
    scheduler.start()
    while not fake.calls:
        time.sleep(0.001)
    stats = scheduler.stats()
    assert (stats.prefilling, stats.waiting) == (3, 3)  # a cache of 128 tokens
    for ticket in (prefilling, begun, *queued, queued[0]):
        ticket.cancel()
        assert not ticket.done
    fake.gate.set()
    for ticket in (prefilling, begun, *queued):
        assert tokens_of(ticket) == []
        assert ticket.result().finish_reason == "cancelled"
    assert fake.calls == [("prefill.host", 14)]  # 40 tokens in three chunks: one was under way
    updates = []
    decoding = scheduler.submit(
        request(
            [3],
            60,
            eos=(),
            listener=lambda u: (updates.append(u), len(updates) == 3 and decoding.cancel()),
        )
    )
    assert len(tokens_of(decoding)) == 3
    assert updates[-1].finish_reason == "cancelled" and updates[-1].token_ids == ()
    assert scheduler.stats().kv_used == 0
    scheduler.close()


@pytest.mark.parametrize("part", ["sampling", "mask", "listener", "late listener"])
def test_a_fault_of_one_request_ends_it_alone(fake, part):
    def broken(*_):
        raise ZeroDivisionError("boom")

    updates = []

    def late(update):
        updates.append(update)
        if len(updates) == 2:
            broken()

    bad = request([7, 8, 9], 20, eos=(), listener=updates.append)
    if part == "sampling":
        bad.sampler.sample = broken
    elif part == "mask":
        bad.mask = broken
    else:
        bad.listener = late if part == "late listener" else broken
    with Scheduler(fake) as scheduler:
        good = [scheduler.submit(request([n, 5], 20)) for n in (2, 3)]
        ticket = scheduler.submit(bad)
        with pytest.raises(
            ExecutionError, match=f"request 2: its {part.split()[-1]} raised .*boom"
        ):
            ticket.result()
        assert [tokens_of(t) for t in good] == [reference([n, 5], 20) for n in (2, 3)]
        assert scheduler.failure is None
    assert fake.kv.allocator.used == 0
    if part in ("sampling", "mask"):
        assert updates[-1].finish_reason == "error" and isinstance(
            updates[-1].error, ExecutionError
        )
    if part == "late listener":
        assert len(updates) == 2


def test_a_dead_executor_fails_everything_and_says_so(fake):
    updates = []
    scheduler = Scheduler(fake)
    tickets = [
        scheduler.submit(request([n], 60, eos=(), listener=updates.append)) for n in range(2, 9)
    ]
    fake.gate.clear()
    scheduler.start()
    fake.die()
    fake.gate.set()
    for ticket in tickets:
        with pytest.raises(WorkerError, match="worker 0 died"):
            ticket.result()
    assert sum(isinstance(update.error, WorkerError) for update in updates) == 7
    with pytest.raises(ExecutionError, match="has stopped: native worker 0 died"):
        scheduler.submit(request([2]))
    assert isinstance(scheduler.failure, WorkerError)
    assert scheduler.drain(WAIT)
    scheduler.close()
    stats = scheduler.stats()
    assert (stats.error, stats.finished) == ("native worker 0 died", {"error": 7})
    assert fake.kv.allocator.used == 0


def test_a_stuck_step_shows_and_can_be_abandoned(fake):
    scheduler = Scheduler(fake)
    fake.gate.clear()
    tickets = [scheduler.submit(request([n])) for n in range(2, 5)]
    assert scheduler.stuck_for == 0
    scheduler.start()
    while scheduler.stuck_for < 0.02:
        time.sleep(0.001)
    stats = scheduler.stats()
    assert (stats.phase, stats.prefilling, stats.waiting) == ("prefill.host", 3, 0)
    assert stats.step_age >= 0.02
    scheduler.abandon(ExecutionError("a step hangs"))
    for ticket in tickets:
        with pytest.raises(ExecutionError, match="a step hangs"):
            ticket.result()
    scheduler.close(timeout=0.05)
    fake.gate.set()
    scheduler.close()
    assert fake.kv.allocator.used == 0


def test_closing_never_hangs(fake):
    before = threading.enumerate()
    scheduler = Scheduler(fake)
    waiting = scheduler.submit(request([2]))
    scheduler.close()
    scheduler.start()
    assert waiting.result().finish_reason == "cancelled"
    scheduler = Scheduler(fake)
    fake.gate.clear()
    stuck = scheduler.submit(request([2]))
    scheduler.start()
    while not fake.calls:
        time.sleep(0.001)
    scheduler.close(timeout=0.05)
    with pytest.raises(ExecutionError, match=r"did not end within 0.05 s"):
        stuck.result()
    fake.gate.set()
    scheduler.close()
    ours = [thread for thread in threading.enumerate() if thread not in before]
    assert not [thread for thread in ours if thread.name == "hmc-scheduler"]
    assert fake.kv.allocator.used == 0
    with pytest.raises(ExecutionError, match="closing"):
        scheduler.submit(request([2]))


def test_draining_finishes_what_was_accepted(fake):
    scheduler = Scheduler(fake)
    tickets = [scheduler.submit(request([n], 20, eos=())) for n in range(2, 9)]
    assert not scheduler.drain(0.01)
    with pytest.raises(ExecutionError, match="closing"):
        scheduler.submit(request([2]))
    scheduler.start()
    assert scheduler.drain(WAIT)
    assert all(ticket.done for ticket in tickets)
    assert [tokens_of(t) for t in tickets] == [reference([n], 20, ()) for n in range(2, 9)]
    scheduler.close()
