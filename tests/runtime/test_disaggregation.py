"""A scheduler with a prefill process: the same answers, decoding that goes on meanwhile, and an end
to everything whatever dies, hangs or is cancelled. And when such a process is chosen.
"""

import os
import random
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from paged_fake import WAIT, crowded, prompts, request, tokens_of

import hmc
from hmc.errors import ExecutionError, MachineError, UsageError, WorkerError
from hmc.machine.detect import load_machine
from hmc.machine.topology import Node, Topology
from hmc.plan.phases import PREFILL, in_own_process
from hmc.predict.disaggregation import Load, divided, interleaved
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.prefill.disaggregation import Disaggregated, Division, decide

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = EXAMPLES / "tiny-kjv"
CPUS = tuple(sorted(os.sched_getaffinity(0)))
DIVISION = Division(CPUS[:1], CPUS[-1:])
CHUNK = 16


@pytest.fixture(scope="module")
def both():
    plan = hmc.compile(TINY, max_context=512, max_chunk=CHUNK, threads=2)
    with Disaggregated(plan, division=DIVISION) as both:
        assert both.worker.wait_ready(WAIT)
        yield both


@pytest.fixture
def scheduler(both):
    both.worker.restarts = 0
    with Scheduler(both.engine.executor, prefill=both.worker) as scheduler:
        yield scheduler
    kv = both.engine.executor.kv
    assert kv.allocator.used == 0 and kv.rows_free == both.engine.plan.limits.max_batch


def prompt(both, tokens, seed=0):
    random_ = np.random.default_rng(seed)
    return random_.integers(3, both.engine.plan.model.vocab, tokens).tolist()


def alone(both, ids, new):
    """The greedy answer of the executor itself; its scheduler must rest."""
    executor, tokens = both.engine.executor, []
    sequence = executor.open()
    for part in executor.prefill(sequence, np.array(ids, np.int32)):
        logits = part
    while True:
        tokens.append(int(np.argmax(logits[-1])))
        if len(tokens) == new:
            executor.release(sequence)
            return tokens
        logits = executor.decode([sequence], np.array(tokens[-1:], np.int32))


def ask(ids, new, **options):
    return request(ids, new, eos=(), **options)


def until(condition):
    limit = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


@contextmanager
def paused(worker):
    """The process does nothing in the `with` block."""
    pid = worker.pid
    os.kill(pid, signal.SIGSTOP)
    stat = Path(f"/proc/{pid}/stat")
    until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T")
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("prefix_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_mixed_requests_answer_as_if_alone(both, prefix_cache, monkeypatch):
    vocab = both.engine.plan.model.vocab
    made = [*prompts(18, 300, vocab), *prompts(6, CHUNK, vocab, seed=2)]
    random.Random(4).shuffle(made)
    mixed = [(ids, 1 + 5 * i % 23) for i, ids in enumerate(made)]
    expected = [alone(both, ids, new) for ids, new in mixed]
    calls = both.engine.executor.calls
    before = calls[PREFILL]
    executor, worker = both.engine.executor, both.worker
    if not prefix_cache:
        monkeypatch.setattr(executor.kv, "adopt", lambda *_: 0)
    with Scheduler(executor, prefill=worker) as scheduler:
        tickets = [scheduler.submit(ask(ids, new)) for ids, new in mixed]
        assert [tokens_of(ticket) for ticket in tickets] == expected
        stats = scheduler.stats()
    assert stats.prompt_tokens + stats.prefix_tokens == sum(len(ids) for ids, _ in mixed)
    assert (stats.prefix_hits > 0) == prefix_cache
    assert 6 <= calls[PREFILL] - before < 18  # short ones here, in one chunk; the others there
    assert sum(step.prefilled for step in stats.recent) < stats.prompt_tokens / 4
    assert (stats.prefill.restarts, stats.prefill.prompts, stats.prefill.alive) == (0, 0, True)
    assert executor.kv.allocator.used == 0


def test_what_was_prefilled_beside_serves_the_next_prompt_and_scores_stay_here(both, scheduler):
    ids = prompt(both, 200, seed=5)
    longer = ids + prompt(both, 90, seed=6)
    expected = alone(both, longer, 9)
    tokens_of(scheduler.submit(ask(ids, 1)))
    assert tokens_of(scheduler.submit(ask(longer, 9))) == expected
    block = both.engine.plan.kv.block
    assert scheduler.stats().prefix_tokens == 200 // block * block
    updates = []
    with paused(both.worker):
        scored = ask(ids, 0, logprobs=0, prompt_logprobs=True, listener=updates.append)
        assert tokens_of(scheduler.submit(scored)) == []
    assert len(updates[0].prompt_logprobs) == 199
    assert tokens_of(scheduler.submit(ask(ids, 0))) == []


def test_decoding_goes_on_while_the_process_computes(both, scheduler):
    ids = prompt(both, 480, seed=7)
    expected = alone(both, ids, 4)
    seen = []

    def look(update):
        state = scheduler.stats().prefill
        seen.append((state.tokens, state.total))

    with paused(both.worker):
        decoding = scheduler.submit(ask(prompt(both, 5, seed=8), 400, listener=look))
        until(lambda: len(seen) > 3)
        late = scheduler.submit(ask(ids, 4))
        until(lambda: seen[-1][1] == 480)
        count = len(seen)
        until(lambda: len(seen) > count + 5)  # the process is held up, nobody else is
        assert not decoding.done and not late.done
        short = scheduler.submit(ask(prompt(both, 6, seed=9), 3))
        assert len(tokens_of(short)) == 3
        assert scheduler.stats().prefilling == 1
    assert tokens_of(late) == expected
    steps = {tokens for tokens, total in seen if total == 480 and 0 < tokens < 480}
    assert len(steps) > 2  # tokens came between its chunks
    decoding.cancel()
    decoding.wait(WAIT)


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_nobody_notices(both, scheduler):
    long, other, next_one = (prompt(both, n, seed=n) for n in (400, 300, 9))
    expected = [alone(both, long, 6), alone(both, other, 5), alone(both, next_one, 60)]
    with paused(both.worker) as pid:
        tickets = [scheduler.submit(ask(long, 6)), scheduler.submit(ask(other, 5))]
        tickets.append(scheduler.submit(ask(next_one, 60)))
        until(lambda: scheduler.stats().prefill.prompts == 1)
        os.kill(pid, signal.SIGKILL)
        assert [tokens_of(ticket) for ticket in tickets] == expected
    state = scheduler.stats().prefill
    assert state.restarts == 1 and state.alive and state.pid != pid
    os.kill(state.pid, signal.SIGKILL)  # an idle one is replaced too
    until(lambda: scheduler.stats().prefill.restarts == 2 and scheduler.stats().prefill.ready)


@pytest.mark.slow
def test_a_prompt_that_kills_twice_fails_alone(both, scheduler):
    ids, other = prompt(both, 400, seed=11), prompt(both, 300, seed=12)
    expected = alone(both, other, 5)
    with paused(both.worker):
        doomed = scheduler.submit(ask(ids, 6))
        until(lambda: scheduler.stats().prefill.total == 400)
        waiting = scheduler.submit(ask(other, 5))
        os.kill(both.worker.pid, signal.SIGKILL)
        until(lambda: scheduler.stats().prefill.restarts == 1)
        until(lambda: scheduler.stats().prefill.total == 400)
        os.kill(both.worker.pid, signal.SIGKILL)  # before it has loaded
        until(lambda: scheduler.stats().prefill.restarts == 2)
    with pytest.raises(WorkerError, match=r"lost twice, .* killed by signal 9 .*: send it again"):
        tokens_of(doomed)
    assert tokens_of(waiting) == expected


@pytest.mark.slow
def test_a_hung_process_is_killed(both):
    ids = prompt(both, 400, seed=13)
    expected = alone(both, ids, 6)
    both.worker.wait_ready(WAIT)
    executor = both.engine.executor
    with (
        Scheduler(executor, prefill=both.worker) as scheduler,
        paused(both.worker) as pid,
    ):
        both.worker.silence = 0.2  # for this process; the next one has to load
        ticket = scheduler.submit(ask(ids, 6))
        until(lambda: both.worker.pid != pid)
        both.worker.silence = 20.0
        assert tokens_of(ticket) == expected


def test_blocks_of_a_cancelled_prompt_are_free_when_the_process_has_let_go(both, scheduler):
    allocator = both.engine.executor.kv.allocator
    both.worker.wait_ready(WAIT)
    with paused(both.worker):
        first = scheduler.submit(ask(prompt(both, 400, seed=14), 6))
        second = scheduler.submit(ask(prompt(both, 300, seed=15), 6))
        until(lambda: scheduler.stats().prefilling == 2)
        held = allocator.used
        for ticket in (first, second):
            ticket.cancel()
            assert tokens_of(ticket) == []
            assert ticket.result().finish_reason == "cancelled"
        until(lambda: allocator.used < held)  # the second had not been begun
        time.sleep(0.05)
        assert 0 < allocator.used < held
        assert scheduler.drain(WAIT)  # all requests have ended
    until(lambda: allocator.used == 0)


def test_a_prompt_beside_makes_room_for_who_came_before(both):
    kv = both.engine.executor.kv
    both.worker.wait_ready(WAIT)
    ids, long = prompt(both, CHUNK, seed=20), prompt(both, 400, seed=21)
    expected = alone(both, ids, 180), alone(both, long, 6)
    with crowded(kv, left=9), Scheduler(both.engine.executor, prefill=both.worker) as crowd:
        with paused(both.worker):
            first = crowd.submit(ask(ids, 180))
            second = crowd.submit(ask(long, 6))
            until(lambda: crowd.stats().preemptions == 1)
            stats = crowd.stats()
            assert (stats.running, stats.waiting) == (1, 1)
            assert stats.kv_used == stats.kv_total  # the process may still write there
        assert tokens_of(first) == expected[0]
        assert tokens_of(second) == expected[1]
    assert kv.allocator.used == 0


@pytest.mark.slow
def test_closing_does_not_wait_for_a_hung_process(both):
    executor = both.engine.executor
    both.worker.wait_ready(WAIT)
    scheduler = Scheduler(executor, prefill=both.worker)
    scheduler.start()
    with paused(both.worker) as pid:
        ticket = scheduler.submit(ask(prompt(both, 400, seed=16), 6))
        until(lambda: scheduler.stats().prefill.total)
        began = time.monotonic()
        scheduler.close()
        assert time.monotonic() - began < 8
        assert ticket.result().finish_reason == "cancelled"
        assert executor.kv.allocator.used == 0
        assert not Path(f"/proc/{pid}").exists()
        both.worker.restart()
    ids = prompt(both, 60)
    expected = alone(both, ids, 3)
    with Scheduler(executor, prefill=both.worker) as scheduler:
        assert tokens_of(scheduler.submit(ask(ids, 3))) == expected


@pytest.mark.slow
def test_a_failing_executor_ends_prompts_beside_too(both, monkeypatch):
    executor = both.engine.executor
    both.worker.wait_ready(WAIT)

    def broken(*_):
        raise WorkerError("native worker 0 died")

    with Scheduler(executor, prefill=both.worker) as scheduler, paused(both.worker):
        beside = scheduler.submit(ask(prompt(both, 400, seed=17), 6))
        until(lambda: scheduler.stats().prefill.total)
        monkeypatch.setattr(executor, "decode", broken)
        failing = scheduler.submit(ask([5], 6))
        for ticket in (beside, failing):
            with pytest.raises(WorkerError, match="worker 0 died"):
                tokens_of(ticket)
        with pytest.raises(ExecutionError, match="stopped"):
            scheduler.submit(ask([5], 6))
        scheduler.close()
        assert executor.kv.allocator.used == 0
    both.worker.restart()


@pytest.mark.slow
def test_a_storm_of_cancellations_leaves_nothing_behind(both, scheduler):
    rng = random.Random(1)
    made = prompts(14, 200, both.engine.plan.model.vocab, seed=3)
    expected = [alone(both, ids, 12) for ids in made]
    accepted = []
    for number in range(240):
        which, new = rng.randrange(len(made)), rng.randrange(1, 12)
        while scheduler.stats().waiting > 20:
            accepted[-rng.randrange(1, 15)][0].wait(0.02)
        accepted.append((scheduler.submit(ask(made[which], new)), which, new))
        if number % 2:
            accepted[-rng.randrange(1, min(25, len(accepted) + 1))][0].cancel()
    ends = dict.fromkeys(("length", "cancelled"), 0)
    for ticket, which, new in accepted:
        tokens = tokens_of(ticket)
        ends[ticket.result().finish_reason] += 1
        if ticket.result().finish_reason == "length":
            assert tokens == expected[which][:new]
        else:
            assert tokens == expected[which][: len(tokens)]
    assert ends["cancelled"] > 30 and ends["length"] > 80
    stats = scheduler.stats()
    assert (stats.running, stats.prefilling, stats.waiting) == (0, 0, 0)
    until(lambda: both.engine.executor.kv.allocator.used == 0)
    assert scheduler.stats().prefill.restarts == 0


def mappings(pid, name):
    """(Rss, Pss) bytes of a process's mappings of a file."""
    found, inside = {"Rss": 0, "Pss": 0}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            inside = name in line
        elif inside and head[:-1] in found:
            found[head[:-1]] += int(rest[0]) << 10
    return found["Rss"], found["Pss"]


@pytest.mark.slow
@pytest.mark.parametrize("dummy", [False, True])
def test_weights_and_cache_are_in_memory_once(checkpoint, dummy):
    plan = hmc.compile(checkpoint("qwen3_moe", "fp8"), max_context=512, max_chunk=64, threads=2)
    weights = "hmc dummy weights" if dummy else plan.checkpoint.shards[0].name
    with (
        Disaggregated(plan, division=DIVISION, dummy_weights=dummy) as both,
        Scheduler(both.engine.executor, prefill=both.worker) as scheduler,
    ):
        ids = np.arange(3, 403) % plan.model.vocab
        tokens_of(scheduler.submit(ask(ids, 4)))
        for name in (weights, "hmc KV cache"):
            mine, its = mappings(os.getpid(), name), mappings(both.worker.pid, name)
            assert mine[0] and its[0], name
            assert mine[1] + its[1] <= max(mine[0], its[0]) + 4096, name


def test_the_policy_takes_long_prompts_of_the_host_phase():
    plan = hmc.compile(TINY, max_context=512, max_chunk=CHUNK)
    assert not in_own_process(plan, PREFILL, CHUNK, every=False)
    assert in_own_process(plan, PREFILL, CHUNK + 1, every=False)
    assert not in_own_process(plan, PREFILL, 500, every=True)
    assert not in_own_process(plan, "prefill.stream", 500, every=False)


# -- the decision ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big():
    """A plan of real shapes, never run."""
    directory = EXAMPLES / "configs" / "qwen3-30b-a3b-fp8"
    return hmc.compile(directory, dummy_weights=True, layers=4, max_context=16384, threads=16)


def machine(cores, read, gemv):
    """A machine without GPUs whose memory gives `read` bytes/s and decode matmuls `gemv`."""
    laptop = load_machine("laptop")
    rates = laptop.rates

    def at(rate, value):
        return rate.model_copy(update={"value": value})

    points = tuple(p.model_copy(update={"rate": at(p.rate, gemv)}) for p in rates.gemv)
    rates = rates.model_copy(update={"read": (at(rates.read[0], read),), "gemv": points})
    return laptop.model_copy(update={"cores": cores, "gpus": (), "rates": rates})


def cores(count):
    return Topology((Node(0, tuple((i,) for i in range(count)), 0),), ())


def test_auto_chooses_it_where_few_cores_fill_the_memory(big):
    found = decide(big, "auto", machine=machine(16, 60e9, 55e9), topology=cores(16))
    assert found.division is not None
    decode, prefill = found.division.decode, found.division.prefill
    assert len(decode) >= 5 and len(prefill) >= 8  # five cores of 12 GB/s read 60
    assert sorted(decode + prefill) == list(range(16))
    assert "predicted" in found.reason and "\n" not in found.reason
    slow = decide(big, "auto", machine=machine(16, 600e9, 10e9), topology=cores(16))
    assert slow.division is None and "prefill process: no" in slow.reason


def test_two_cores_are_not_divided(big):
    two = decide(big, "auto", machine=machine(2, 20e9, 8e9), threads=2, topology=cores(2))
    assert two.division is None and "instead of" in two.reason
    one = decide(big, "auto", machine=machine(1, 20e9, 8e9), threads=1, topology=cores(1))
    assert one.division is None and "one thread" in one.reason
    unknown = decide(big, "auto", machine=None, topology=cores(16))
    assert unknown.division is None and "hmc probe" in unknown.reason


def test_it_is_had_when_asked_for(big):
    here = machine(2, 20e9, 8e9)
    found = decide(big, "on", machine=here, threads=2, topology=cores(2))
    assert found.division == Division((1,), (0,)) and "as asked for" in found.reason
    found = decide(big, "on", machine=None, topology=cores(16), prefill_threads=3)
    assert (len(found.division.decode), len(found.division.prefill)) == (13, 3)
    assert decide(big, "off", machine=here).division is None
    with pytest.raises(UsageError, match="--prefill-threads 16"):
        decide(big, "on", machine=None, topology=cores(16), prefill_threads=16)
    with pytest.raises(MachineError, match="two cores"):
        decide(big, "on", machine=None, topology=cores(1))
    short = hmc.compile(TINY, max_context=64, max_chunk=64)
    assert "one chunk" in decide(short, "auto", machine=here, threads=2).reason
    with pytest.raises(UsageError, match="one chunk"):
        decide(short, "on", machine=here, threads=2)


def test_predictions_follow_the_cores(big):
    here, load = machine(16, 60e9, 55e9), Load(8192, 2)
    whole = interleaved(big, here, load, cores=16, of=16)
    half = interleaved(big, here, load, cores=8, of=16)
    assert half.ttft > 1.5 * whole.ttft and half.tpot > 1.5 * whole.tpot
    assert half.tpot_alone == pytest.approx(whole.tpot_alone, rel=0.3)  # bound by the memory
    few, many = (divided(big, here, load, decode=16 - n, prefill=n, of=16) for n in (4, 12))
    assert few.ttft > 2 * many.ttft
    assert few.tpot <= many.tpot and many.tpot >= many.tpot_alone
    bare = here.model_copy(update={"rates": None})
    with pytest.raises(MachineError, match="no rates"):
        interleaved(big, bare, load, cores=16, of=16)
