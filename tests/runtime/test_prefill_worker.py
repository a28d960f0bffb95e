"""The prefill process: what a single process computes, over one copy of everything, and no way to
hang on it.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import hmc
from hmc.errors import (
    ExecutionError,
    MachineError,
    PlanMismatchError,
    UsageError,
    WorkerError,
)
from hmc.machine.topology import Node, Topology
from hmc.plan.file import save
from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import KVCache, Sequence, cache_bytes
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.prefill.disaggregation import Division, divide_cpus
from hmc.runtime.prefill.worker import PrefillWorker
from hmc.runtime.weights.store import WeightStore

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-kjv"
CPUS = tuple(sorted(os.sched_getaffinity(0)))[:2]
LONG = 60.0


def until(condition):
    limit = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


def result(worker, job):
    def over():
        worker.hear()
        return job.over

    until(over)
    if job.error is not None:
        raise job.error
    return job.logits


class Pair:
    """A decoding executor and a prefill process beside it."""

    def __init__(self, plan, directory, executor, cache, worker):
        self.plan, self.directory = plan, directory
        self.executor, self.cache, self.worker = executor, cache, worker

    def begin(self, ids):
        sequence = self.executor.open()
        return self.more(sequence, ids)

    def more(self, sequence, ids):
        self.executor.kv.reserve(sequence, len(ids))
        return sequence, self.worker.start(sequence, ids)

    def result(self, job):
        return result(self.worker, job)

    def ended(self, sequence, ids):
        sequence.length += len(ids)

    def decode(self, sequence, logits, steps=6):
        """The greedy tokens that follow, and their logits."""
        tokens, rows = [int(np.argmax(logits))], [logits]
        for _ in range(steps):
            rows.append(self.executor.decode([sequence], np.array(tokens[-1:], np.int32))[0].copy())
            tokens.append(int(np.argmax(rows[-1])))
        return tokens, np.stack(rows)

    def alone(self, ids):
        """The same by the executor itself."""
        sequence = self.executor.open()
        for part in self.executor.prefill(sequence, ids):
            logits = part[0].copy() if len(part) else None
        found = self.decode(sequence, logits)
        self.executor.release(sequence)
        return found


def placed(*blocks):
    """A sequence that has these cache blocks."""
    found = Sequence(0)
    found.blocks = list(blocks)
    return found


@contextmanager
def opened(directory, home="shared", **options):
    plan = hmc.compile(directory, **options)
    cache = SharedBlock(cache_bytes(plan.kv), "KV cache")
    kv = KVCache(plan.kv, plan.limits.max_context, cache)
    executor = Executor(plan, directory, home=home, kv=kv, cpus=CPUS)
    try:
        with PrefillWorker(plan, directory, executor.store, cache, cpus=CPUS) as worker:
            yield Pair(plan, directory, executor, cache, worker)
    finally:
        executor.close()
        kv.close()


@pytest.fixture(scope="module")
def pair():
    with opened(TINY, max_context=256, max_chunk=16) as found:
        yield found


def prompt(pair, tokens, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(3, pair.plan.model.vocab, tokens).astype(np.int32)


def same(found, expected):
    assert found[0] == expected[0]
    assert np.array_equal(found[1], expected[1])


def test_logits_and_what_is_decoded_after_them_are_those_of_one_process(pair):
    ids = prompt(pair, 100)
    sequence, job = pair.begin(ids)
    logits = pair.result(job)
    assert job.tokens == 100 and job.over
    pair.ended(sequence, ids)
    same(pair.decode(sequence, logits), pair.alone(ids))
    # A second turn, after tokens that the parent decoded.
    more = prompt(pair, 21, seed=1)
    past = sequence.length
    _, job = pair.more(sequence, more)
    found = pair.result(job)
    sequence.length = past
    expected = [part.copy() for part in pair.executor.prefill(sequence, more)][-1][0]
    assert np.array_equal(found, expected)
    pair.executor.release(sequence)
    assert pair.executor.kv.allocator.used == 0


@pytest.mark.slow
def test_another_family_with_mapped_shards(checkpoint):
    with opened(checkpoint("qwen3_moe", "fp8"), "mapped", max_context=128, max_chunk=24) as pair:
        ids = prompt(pair, 77)
        sequence, job = pair.begin(ids)
        logits = pair.result(job)
        pair.ended(sequence, ids)
        same(pair.decode(sequence, logits), pair.alone(ids))


def test_prompts_one_after_the_other_while_the_parent_decodes(pair):
    prompts = [prompt(pair, tokens, seed=tokens) for tokens in (90, 17)]
    other, busy = prompt(pair, 30, seed=9), pair.executor.open()
    expected = [pair.alone(ids) for ids in prompts]
    expected_busy = pair.alone(other)
    for part in pair.executor.prefill(busy, other):
        first = part[0].copy() if len(part) else None
    begun = []
    for ids in prompts:
        begun.append(pair.begin(ids))
        if len(begun) == 1:
            same(pair.decode(busy, first), expected_busy)
        pair.result(begun[-1][1])
    for (sequence, job), ids, each in zip(begun, prompts, expected, strict=True):
        pair.ended(sequence, ids)
        same(pair.decode(sequence, job.logits), each)
        pair.executor.release(sequence)
    pair.executor.release(busy)


def stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def pause(pair):
    os.kill(pair.worker.pid, signal.SIGSTOP)
    until(lambda: stopped(pair.worker.pid))


def test_a_cancelled_job_writes_no_more(pair):
    pair.worker.wait_ready(LONG)
    pause(pair)
    sequence, job = pair.begin(prompt(pair, 240))
    pair.worker.hear()
    assert not job.over and job.silent_seconds > 0
    os.kill(pair.worker.pid, signal.SIGCONT)
    job.stopped = True
    with pytest.raises(ExecutionError, match="cancelled"):
        pair.result(job)
    assert job.tokens < 240 and job.silent_seconds == 0
    before = pair.executor.kv.array(0, "latent").copy()
    last, next_job = pair.begin(prompt(pair, 50, seed=3))
    job.stopped = True  # of what is over: nothing
    assert pair.result(next_job) is not None
    after = pair.executor.kv.array(0, "latent")
    for block in sequence.blocks:
        assert np.array_equal(before[block], after[block])
    for each in (sequence, last):
        pair.executor.release(each)


@pytest.mark.slow
def test_cancel_takes_effect_in_the_middle(pair):
    ids = prompt(pair, 250)
    pair.worker.wait_ready(LONG)
    for _ in range(20):  # a fast process may be through before it is told
        sequence, job = pair.begin(ids)
        until(lambda job=job: pair.worker.hear() or job.over or job.tokens)
        job.stopped = True
        with suppress(ExecutionError):
            pair.result(job)
        pair.executor.release(sequence)
        if job.tokens < len(ids):
            break
    assert 0 < job.tokens < len(ids)


def test_a_killed_process_is_named_and_replaced(pair):
    ids = prompt(pair, 200)
    expected = pair.alone(ids)
    pair.worker.wait_ready(LONG)
    pause(pair)
    sequence, job = pair.begin(ids)
    os.kill(pair.worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"signal 9 \(SIGKILL\)"):
        pair.result(job)
    assert job.lost and pair.worker.start(sequence, ids) is None
    pair.worker.tend(wanted=True)
    again = pair.worker.start(sequence, ids)  # before it is ready
    logits = pair.result(again)
    assert pair.worker.state(0, 0, 0).restarts == 1
    pair.ended(sequence, ids)
    same(pair.decode(sequence, logits), expected)
    pair.executor.release(sequence)


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_with_close(checkpoint):
    with opened(checkpoint("qwen3_moe", "fp8"), max_context=128) as pair:
        pair.worker.wait_ready(LONG)
        pid = pair.worker.pid
        pause(pair)
        _, job = pair.begin(prompt(pair, 20))
        began = time.monotonic()
        pair.worker.close()
        pair.worker.close()
        assert time.monotonic() - began < 10
        assert not Path(f"/proc/{pid}").exists()
        with pytest.raises(WorkerError, match="closed"):
            pair.result(job)


def maps(pid, name):
    """(Rss, Pss) bytes of the mappings of a memory file."""
    found, inside = {"Rss": 0, "Pss": 0}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            inside = name in line
        elif inside and head[:-1] in found:
            found[head[:-1]] += int(rest[0]) << 10
    return found["Rss"], found["Pss"]


@pytest.mark.slow
def test_weights_and_cache_are_there_once(pair):
    ids = prompt(pair, 200)
    sequence, job = pair.begin(ids)
    pair.result(job)
    pair.alone(ids)
    for name in ("memfd:hmc shared weights", "memfd:hmc KV cache"):
        mine, its = maps(os.getpid(), name), maps(pair.worker.pid, name)
        assert its[0] > 0, name
        # pages that one side alone has touched count for it, those of both by halves
        whole = cache_bytes(pair.plan.kv) if "cache" in name else max(mine[0], its[0])
        assert mine[1] + its[1] <= whole + 4096, name
    pair.executor.release(sequence)


@pytest.mark.slow
def test_dummies_are_shared_in_an_arena_only(checkpoint):
    directory = checkpoint("qwen3_moe", "fp8")
    plan = hmc.compile(directory, max_context=64)
    cache = SharedBlock(cache_bytes(plan.kv), "KV cache")
    with pytest.raises(UsageError, match="shared"):
        PrefillWorker(plan, None, WeightStore.open(plan, None, dummy=True), cache, cpus=CPUS)
    store = WeightStore.open(plan, None, dummy=True, home="shared")
    ids = np.arange(3, 40, dtype=np.int32)
    with PrefillWorker(plan, None, store, cache, cpus=CPUS[:1]) as worker:
        found = result(worker, worker.start(placed(1), ids))
    executor = Executor(plan, None, store=store, threads=1)
    expected = list(executor.prefill(executor.open(), ids))[-1][0]
    assert np.array_equal(found, expected)
    executor.close(), store.close(), cache.close()


def test_a_process_that_cannot_begin_says_why(checkpoint):
    plan = hmc.compile(checkpoint("qwen3_moe", "fp8"), max_context=64)
    other = hmc.compile(checkpoint("mixtral", "fp8"), max_context=64)
    store = WeightStore.open(other, None, dummy=True, home="shared")
    cache = SharedBlock(cache_bytes(plan.kv), "KV cache")
    with PrefillWorker(plan, None, store, cache, cpus=CPUS) as worker:
        job = worker.start(placed(0), np.array([3, 4], np.int32))
        with pytest.raises(PlanMismatchError, match="other weights"):
            worker.wait_ready(LONG)
        with pytest.raises(PlanMismatchError):
            result(worker, job)
    store.close(), cache.close()


PARENT = """
import sys, time
from pathlib import Path
from hmc.plan.file import load
from hmc.runtime.memory.kv import cache_bytes
from hmc.runtime.prefill.worker import PrefillWorker
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.weights.store import WeightStore
directory, plan = Path(sys.argv[1]), load(sys.argv[2])
store = WeightStore.open(plan, directory, home="shared")
cache = SharedBlock(cache_bytes(plan.kv), "KV cache")
options = dict(cpus=[int(sys.argv[3])])
ready = PrefillWorker(plan, directory, store, cache, **options)
ready.wait_ready()
starting = PrefillWorker(plan, directory, store, cache, **options)
print(ready.pid, starting.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_parent_takes_its_processes_along(pair, tmp_path):
    save(pair.plan, tmp_path / "p.hmp")
    files = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", PARENT, str(TINY), str(tmp_path / "p.hmp"), str(CPUS[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2 and not any(map(ended, pids))
        parent.kill()
    until(lambda: all(map(ended, pids)))
    assert set(os.listdir("/dev/shm")) <= files


def ended(pid):
    """Whether it is gone, or dead and not yet waited for by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def machine(*nodes):
    return Topology(tuple(Node(i, cores, i) for i, cores in enumerate(nodes)), ())


def test_cores_are_divided_whole_and_over_all_nodes():
    two = machine(tuple((i, i + 16) for i in range(8)), tuple((i, i + 16) for i in range(8, 16)))
    found = divide_cpus(two, 16, 0.25)
    decode, prefill = found.decode, found.prefill
    assert (len(decode), len(prefill)) == (12, 4)
    assert [cpu % 16 // 8 for cpu in prefill] == [0, 0, 1, 1]
    assert [cpu % 16 // 8 for cpu in decode] == [0] * 6 + [1] * 6
    found = divide_cpus(two, 32, 0.5)  # with siblings
    assert sorted(found.decode + found.prefill) == list(range(32))
    assert {cpu % 16 for cpu in found.decode}.isdisjoint(cpu % 16 for cpu in found.prefill)
    for share, expected in ((0.01, 1), (0.99, 15)):
        assert len(divide_cpus(two, 16, share).prefill) == expected
    uneven = machine(((0,), (1,), (2,)), ((3,),))
    assert divide_cpus(uneven, 4, 0.5) == Division((2, 3), (0, 1))
    with pytest.raises(MachineError, match="two cores"):
        divide_cpus(machine(((0, 1),)), 2, 0.5)
    with pytest.raises(ValueError, match="share"):
        divide_cpus(two, 4, 1.0)
