"""Many requests at once: every answer is what it would be alone, and everything ends, whatever is
cancelled or breaks.
"""

import random
import time

import numpy as np
import pytest
from paged_fake import VOCAB, WAIT, PagedFake, crowded, prompts, reference, request, tokens_of

import hmc
from hmc.errors import (
    CapacityError,
    ContextLengthError,
    ExecutionError,
    QueueFullError,
    UsageError,
)
from hmc.plan import Switch
from hmc.plan.phases import chunk_tokens, decode_phase, prefill_phase
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.tokens.requests import token_logprob


@pytest.fixture
def fake():
    fake = PagedFake()
    yield fake
    fake.gate.set()
    fake.close()


@pytest.fixture(scope="module")
def engine(request, checkpoint):
    family = getattr(request, "param", "qwen3_moe")
    directory = checkpoint(family, "fp8", with_tokenizer=True)
    with hmc.Engine(hmc.compile(directory, max_context=320, max_chunk=128)) as engine:
        yield engine


@pytest.mark.few(2)
@pytest.mark.parametrize("engine", ["qwen3_moe", "deepseek_v3"], indirect=True)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_mixed_requests_answer_as_if_alone(engine, prefix_cache, monkeypatch):
    mixed = [(ids, 1 + 5 * i % 23) for i, ids in enumerate(prompts(32, 250, 503))]
    alone = [engine.generate(ids, max_new_tokens=new, temperature=0) for ids, new in mixed]
    if not prefix_cache:
        monkeypatch.setattr(engine.executor.kv, "adopt", lambda *_: 0)
    with Scheduler(engine.executor) as scheduler:
        tickets = [
            scheduler.submit(request(ids, new, eos=engine.eos_token_ids, text=engine.text))
            for ids, new in mixed
        ]
        for ticket, expected in zip(tickets, alone, strict=True):
            assert tokens_of(ticket) == list(expected.token_ids)
            found = ticket.result()
            assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
        stats = scheduler.stats()
    assert (stats.prefix_hits > 0) == prefix_cache == (stats.prefix_tokens > 0)
    assert stats.prompt_tokens + stats.prefix_tokens == sum(len(ids) for ids, _ in mixed)
    assert stats.tokens_generated == sum(len(each.token_ids) for each in alone)
    assert max(step.decoded for step in stats.recent) > 4
    assert engine.executor.kv.allocator.used == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("engine", ["qwen3_moe", "deepseek_v3"], indirect=True)
def test_requests_that_make_room_answer_as_if_alone(engine):
    mixed = [(ids, 40 + 9 * i) for i, ids in enumerate(prompts(12, 120, 503, seed=8))]
    sampling = {"temperature": 0.8, "seed": 3}
    alone = [engine.generate(ids, max_new_tokens=new, **sampling) for ids, new in mixed]
    kv = engine.executor.kv
    with crowded(kv, left=7), Scheduler(engine.executor) as scheduler:
        tickets = [
            scheduler.submit(request(ids, new, eos=engine.eos_token_ids, sampling=sampling))
            for ids, new in mixed
        ]
        for ticket, expected in zip(tickets, alone, strict=True):
            assert tokens_of(ticket) == list(expected.token_ids)
        stats = scheduler.stats()
    assert stats.preemptions > 0
    assert kv.allocator.used == 0


def test_sampling_by_seed_does_not_depend_on_neighbours(engine):
    ids, sampling = list(range(5, 90)), {"temperature": 1.0, "seed": 5}
    alone = engine.generate(ids, max_new_tokens=12, **sampling)
    with Scheduler(engine.executor) as scheduler:
        others = [
            scheduler.submit(request(ids[i:], 20, sampling={"temperature": 1.0, "seed": i}))
            for i in range(5)
        ]
        mine = scheduler.submit(request(ids, 12, eos=engine.eos_token_ids, sampling=sampling))
        assert tokens_of(mine) == list(alone.token_ids)
        answers = {tuple(tokens_of(ticket)) for ticket in others}
    assert len(answers) == 5


def test_logprobs_are_those_of_the_logits(engine):
    ids, updates = list(range(40, 240)), []
    logits = engine.logits(ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    with Scheduler(engine.executor) as scheduler:
        scheduler.submit(request(ids, 1)).wait(WAIT)  # its blocks may not be taken for scores
        for new in (0, 3):
            updates.clear()
            ticket = scheduler.submit(
                request(ids, new, eos=(), logprobs=4, prompt_logprobs=True, listener=updates.append)
            )
            assert len(tokens_of(ticket)) == new
            scored = updates[0].prompt_logprobs
            assert [entry.token for entry in scored] == ids[1:]
            found = [entry.logprob for entry in scored]
            assert np.allclose(found, expected[np.arange(199), ids[1:]], atol=1e-5)
            for entry, row in zip(scored, expected, strict=False):
                assert [token for token, _ in entry.top] == np.argsort(-row)[:4].tolist()
            assert all(update.prompt_logprobs is None for update in updates[1:])
    assert updates[0].logprobs[0].token == expected[-1].argmax()
    assert updates[0].logprobs[0].logprob == pytest.approx(expected[-1].max(), abs=1e-5)
    assert [len(update.logprobs) for update in updates] == [1, 1, 1]


def test_updates_give_the_answer_in_pieces(engine):
    updates, ids = [], list(range(5, 180))
    whole = engine.generate(ids, max_new_tokens=30, temperature=1.0, seed=11).text
    stop = whole[9:12]
    with Scheduler(engine.executor) as scheduler:
        for _ in range(2):
            updates.clear()
            ticket = scheduler.submit(
                request(
                    ids,
                    30,
                    eos=engine.eos_token_ids,
                    stop=stop,
                    text=engine.text,
                    sampling={"temperature": 1.0, "seed": 11},
                    listener=updates.append,
                )
            )
            result = (ticket.wait(WAIT), ticket.result())[1]
    assert "".join(update.piece for update in updates) == result.text
    assert result.text == whole[: whole.index(stop)]
    assert [update.finish_reason for update in updates] == [None] * (len(updates) - 1) + ["stop"]
    assert tuple(token for update in updates for token in update.token_ids) == result.token_ids
    assert updates[-1].cached_tokens == 128
    timings = updates[-1].timings
    assert (timings.prompt_tokens, timings.new_tokens) == (175, len(result.token_ids))
    assert 0 < timings.ttft_s < timings.total_s


def test_token_logprob_breaks_ties_by_id():
    entry = token_logprob(np.array([1, 3, 3, 0, 3], np.float32), 0, 2)
    assert [token for token, _ in entry.top] == [1, 2]
    assert entry.logprob == pytest.approx(1 - np.log(3 * np.exp(3) + np.exp(1) + 1))
    assert len(token_logprob(np.zeros(3, np.float32), 0, 9).top) == 3


def test_a_real_storm_leaves_nothing_behind(engine):
    rng = random.Random(3)
    made = prompts(20, 200, 503)
    with Scheduler(engine.executor, max_queue=100) as scheduler:
        tickets = []
        for _ in range(60):
            tickets.append(scheduler.submit(request(rng.choice(made), rng.randrange(1, 12))))
            if rng.random() < 0.5:
                rng.choice(tickets).cancel()
            time.sleep(rng.random() * 0.01)
        assert all(ticket.wait(WAIT) for ticket in tickets)
        reasons = [ticket.result().finish_reason for ticket in tickets]
    assert {"cancelled", "length"} <= set(reasons)
    assert engine.executor.kv.allocator.used == 0


def test_a_prompt_is_prefilled_between_decode_steps(fake):
    scheduler = Scheduler(fake)
    first = scheduler.submit(request([5, 6, 7], 30, eos=()))
    second = scheduler.submit(request(range(2, 22), 4, eos=()))
    scheduler.start()
    assert tokens_of(first) == reference([5, 6, 7], 30, ())
    assert tokens_of(second) == reference(range(2, 22), 4, ())
    scheduler.close()
    chunk = ("prefill.host", 4)  # a quarter of 16, and a token for the other after each
    assert fake.calls[:2] == [("prefill.host", 3), ("decode", 1)]
    assert fake.calls[2:11] == [chunk, ("decode", 1)] * 4 + [chunk]
    assert fake.calls[11] == ("decode", 2)


def test_alone_a_prompt_takes_whole_chunks(fake):
    with Scheduler(fake) as scheduler:
        tokens_of(scheduler.submit(request(range(2, 35), 1)))
    assert fake.calls == [("prefill.host", 11)] * 3


def test_switches_choose_the_phases():
    switches = (
        Switch(kind="prefill", phase="prefill.host", tokens=1),
        Switch(kind="prefill", phase="prefill.stream", tokens=20),
        Switch(kind="decode", phase="decode", tokens=1),
        Switch(kind="decode", phase="decode.dual", tokens=2),
    )
    fake = PagedFake(switches=switches)
    plan = fake.plan
    assert [prefill_phase(plan, n) for n in (1, 19, 20)] == ["prefill.host"] * 2 + [
        "prefill.stream"
    ]
    assert [decode_phase(plan, n) for n in (1, 2, 3)] == ["decode", "decode.dual", "decode.dual"]
    assert chunk_tokens(plan, "prefill.stream", 40, 3) == 40
    assert [chunk_tokens(plan, "prefill.host", 40, n) for n in (0, 1)] == [14, 4]
    plain = PagedFake()
    assert prefill_phase(plain.plan, 999) == "prefill.host"
    assert decode_phase(plain.plan, 4) == "decode"
    with Scheduler(fake) as scheduler:
        tokens_of(scheduler.submit(request(range(2, 42), 1)))
        tokens_of(scheduler.submit(request(range(2, 44), 1)))  # 40 known, two left
    assert fake.calls == [("prefill.stream", 40), ("prefill.host", 2)]
    for each in (fake, plain):
        each.close()


def test_what_can_never_fit_is_refused_at_once():
    fake = PagedFake(context=64, capacity=32)
    scheduler = Scheduler(fake)
    with pytest.raises(ContextLengthError, match="65 tokens"):
        scheduler.submit(request([2] * 65))
    with pytest.raises(CapacityError, match="30 tokens and up to 8 new"):
        scheduler.submit(request([2] * 30, 8))
    with pytest.raises(UsageError, match="empty"):
        scheduler.submit(request([]))
    with pytest.raises(UsageError, match="token id 50 at place 1"):
        scheduler.submit(request([2, 50]))
    with pytest.raises(UsageError, match="logprobs=-1"):
        scheduler.submit(request([2], logprobs=-1))
    with pytest.raises(UsageError, match="max_queue=0"):
        Scheduler(fake, max_queue=0)
    assert scheduler.stats().waiting == 0
    scheduler.submit(request([2] * 25, 8))
    scheduler.close()
    fake.close()


def test_the_context_ends_an_answer(fake):
    with Scheduler(fake) as scheduler:
        ticket = scheduler.submit(request([2] * 60, 99, eos=()))
        assert len(tokens_of(ticket)) == 5  # 60 + 4 are stored, the last is only sampled
        assert ticket.result().finish_reason == "length"


def test_the_queue_is_bounded_and_served_in_order(fake):
    scheduler = Scheduler(fake, max_queue=4)
    order = []

    def begun(name):
        return lambda update: name in order or order.append(name)

    # The second asks for more room than the first leaves: those that need little pass it.
    sizes = {"a": 60, "b": 60, "c": 2, "d": 4}
    tickets = [
        scheduler.submit(request([3] * size, 4, eos=(), listener=begun(name)))
        for name, size in sizes.items()
    ]
    fake.kv.reserve(held := fake.open(), 20)
    with pytest.raises(QueueFullError, match="4 requests wait"):
        scheduler.submit(request([2]))
    scheduler.start()
    assert all(ticket.wait(WAIT) for ticket in tickets)
    assert order == ["c", "d", "a", "b"]  # a's chunk between them is the first of several
    scheduler.close()
    fake.release(held)


def test_masks_limit_what_is_sampled(fake):
    allowed = np.zeros(VOCAB, bool)
    allowed[[17, 18]] = True
    seen = []

    def mask(generated):
        seen.append(generated)
        return allowed if len(generated) % 2 else None

    with Scheduler(fake) as scheduler:
        found = tokens_of(scheduler.submit(request([7, 8, 9], 5, eos=(), mask=mask)))
        assert all(token in (17, 18) for token in found[1::2])
        assert found[0] == reference([7, 8, 9], 1)[0]
        assert seen == [found[:n] for n in range(5)]
        for wrong, why in ((np.zeros(VOCAB, bool), "no token"), (np.ones(3, bool), r"bool \[3\]")):
            ticket = scheduler.submit(request([7], 5, mask=lambda _, mask=wrong: mask))
            with pytest.raises(ExecutionError, match=why):
                ticket.result()


def test_own_share_is_what_the_executor_does_not_take(fake, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    with Scheduler(fake) as scheduler:
        tokens_of(scheduler.submit(request([2], 6, eos=())))
    # A decode step reads the clock at its begin, around the call, for the token and at its end.
    steps = [s for s in scheduler.stats().recent if s.decoded and not s.prefilled]
    assert 1 - sum(s.executor for s in steps) / sum(s.seconds for s in steps) == 0.75
