import ctypes
import gc
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from llvmlite import ir

from hmc.codegen.arguments import ARGS, Arg
from hmc.codegen.ir import I64, Emitter, const
from hmc.codegen.isa import best_isa
from hmc.codegen.jit import Jit, Kernel
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.pool import walker
from hmc.codegen.spec import KernelSpec
from hmc.errors import WorkerError
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import Program, ProgramBuilder

ISA = best_isa()
SIZE = 1013

TEST_ARGS = {
    # y[i] = 3 x[(i + shift) mod n] + z[i]: reads other workers' shares of x.
    "test_mix": (Arg("x", "ptr"), Arg("z", "ptr"), Arg("y", "ptr"), Arg("n"), Arg("shift")),
    # y[i] += 1.
    "test_count": (Arg("y", "ptr"), Arg("n")),
    # Worker `victim` ends its thread behind Python's back; the others do nothing.
    "test_exit": (Arg("victim"),),
    # Worker 0 spins until the word at `flag` is not 0.
    "test_hang": (Arg("flag", "ptr"),),
}


def emit_mix(spec: KernelSpec) -> str:
    e = Emitter(spec)
    b, n = e.b, e.arg["n"]
    start, stop = e.split(n)
    with e.for_range(start, stop) as i:
        x = e.load(e.arg["x"], b.srem(b.add(i, e.arg["shift"]), n), I64)
        z = e.load(e.arg["z"], i, I64)
        e.store(b.add(b.mul(x, const(3)), z), e.arg["y"], i)
    return e.finish()


def emit_count(spec: KernelSpec) -> str:
    e = Emitter(spec)
    start, stop = e.split(e.arg["n"])
    with e.for_range(start, stop) as i:
        e.store(e.b.add(e.load(e.arg["y"], i, I64), const(1)), e.arg["y"], i)
    return e.finish()


def emit_exit(spec: KernelSpec) -> str:
    e = Emitter(spec)
    kind = ir.FunctionType(I64, [I64, I64])
    call = ir.InlineAsm(kind, "syscall", "={rax},{rax},{rdi},~{rcx},~{r11},~{memory}", True)
    with e.b.if_then(e.b.icmp_signed("==", e.worker, e.arg["victim"])):
        e.b.call(call, [const(60), const(0)])
    return e.finish()


def emit_hang(spec: KernelSpec) -> str:
    e = Emitter(spec)
    b = e.b
    flag = b.bitcast(e.arg["flag"], I64.as_pointer())
    head, done = b.append_basic_block("head"), b.append_basic_block("done")
    b.cbranch(b.icmp_signed("==", e.worker, const(0)), head, done)
    b.position_at_end(head)
    value = b.load_atomic(flag, "acquire", 8)
    b.cbranch(b.icmp_signed("==", value, const(0)), head, done)
    b.position_at_end(done)
    return e.finish()


@pytest.fixture(scope="module")
def jit() -> Iterator[Jit]:
    ARGS.update(TEST_ARGS)
    tests = {
        "test_mix": emit_mix,
        "test_count": emit_count,
        "test_exit": emit_exit,
        "test_hang": emit_hang,
    }
    yield Jit({**EMITTERS, **tests})
    for name in TEST_ARGS:
        del ARGS[name]


def words(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


def kernel(jit: Jit, op: str) -> Kernel:
    return jit.get(KernelSpec.of(op, ISA.name))


def add_mix(
    builder: ProgramBuilder,
    mix: Kernel,
    buffers: np.ndarray,
    x: int,
    z: int,
    y: int,
    shift: int,
    pieces: tuple[int, int] = (0, 0),
) -> None:
    address = [int(buffers[i].ctypes.data) for i in (x, z, y)]
    args = words(*address, buffers.shape[1], shift)
    builder.add(mix, args, tag=len(args), reads=(x, z), writes=(y,), pieces=pieces)


def random_program(
    jit: Jit, buffers: np.ndarray, records: int, seed: int
) -> tuple[Program, np.ndarray]:
    """A program of random dependencies and what it makes of `buffers`."""
    choose = random.Random(seed)
    builder, expected = ProgramBuilder(), buffers.copy()
    mix = kernel(jit, "test_mix")
    for _ in range(records):
        x, z, y = choose.sample(range(len(buffers)), 3)
        shift = choose.randrange(buffers.shape[1])
        pieces = choose.choice([(0, 0), (4, 3), (8, 0), (5, 5), (40, 30)])
        add_mix(builder, mix, buffers, x, z, y, shift, pieces)
        expected[y] = 3 * np.roll(expected[x], -shift) + expected[z]
    return builder.build(), expected


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("size", [3, SIZE])
def test_records_see_what_they_depend_on(jit: Jit, threads: int, size: int) -> None:
    buffers = np.random.default_rng(size).integers(0, 1 << 60, (6, size))
    program, expected = random_program(jit, buffers, 3000, seed=threads)
    assert 0 < (program.records[:, 2] & walker.BARRIER).sum() < len(program)
    with Pool(jit, ISA, threads) as pool:
        pool.run(program.records)
    np.testing.assert_array_equal(buffers, expected)


@pytest.mark.parametrize("threads", [8, 9, 17])
def test_the_barrier_holds_over_several_groups(jit: Jit, threads: int) -> None:
    buffers = np.random.default_rng(threads).integers(0, 1 << 60, (5, SIZE))
    program, expected = random_program(jit, buffers, 150, seed=threads)
    start = buffers.copy()
    with Pool(jit, ISA, threads) as pool:
        for _ in range(3):
            buffers[:] = start
            pool.run(program.records)
            np.testing.assert_array_equal(buffers, expected)


def test_thousands_of_short_programs(jit: Jit) -> None:
    buffers = np.ones((3, 64), np.int64)
    builder = ProgramBuilder()
    mix = kernel(jit, "test_mix")
    add_mix(builder, mix, buffers, 0, 2, 1, 1)
    add_mix(builder, mix, buffers, 1, 2, 0, 5)
    program = builder.build()
    expected = buffers.copy()
    with Pool(jit, ISA, 2) as pool:
        for _ in range(3000):
            pool.run(program.records)
            expected[1] = 3 * np.roll(expected[0], -1) + expected[2]
            expected[0] = 3 * np.roll(expected[1], -5) + expected[2]
    np.testing.assert_array_equal(buffers, expected)


def test_patched_arguments_are_what_the_next_run_sees(jit: Jit) -> None:
    buffers = np.arange(3 * 10, dtype=np.int64).reshape(3, 10)
    builder = ProgramBuilder()
    add_mix(builder, kernel(jit, "test_mix"), buffers, 0, 1, 2, 0)
    program = builder.build()
    with Pool(jit, ISA, 2) as pool:
        for shift in (0, 3, 9):
            program.patch_all(shift=shift)
            pool.run(program.records)
            np.testing.assert_array_equal(buffers[2], 3 * np.roll(buffers[0], -shift) + buffers[1])


def test_an_empty_program_returns(jit: Jit) -> None:
    with Pool(jit, ISA, 2) as pool:
        pool.run(np.zeros((0, 4), np.int64))
        pool.run(np.zeros((0, 4), np.int64), np.zeros((0, 2, 2), np.int64))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_trace_is_ordered(jit: Jit, threads: int) -> None:
    buffers = np.zeros((4, SIZE), np.int64)
    program, _ = random_program(jit, buffers, 200, seed=5)
    trace = np.zeros((len(program), threads, 2), np.int64)
    with Pool(jit, ISA, threads) as pool:
        began = time.monotonic()
        pool.run(program.records, trace)
        took = time.monotonic() - began
        assert 0 < pool.seconds(trace) <= 1.01 * took
    assert (trace[:, :, 1] >= trace[:, :, 0]).all()
    assert (trace[1:, :, 0] >= trace[:-1, :, 1]).all()
    # After a barrier nobody starts before everybody is through with what came before.
    for index in np.flatnonzero(program.records[:, 2] & walker.BARRIER):
        assert trace[index, :, 0].min() >= trace[:index, :, 1].max()


def test_every_piece_is_done_once_by_any_pool(jit: Jit) -> None:
    """Run after run, by pools of several sizes: tickets start anew each time."""
    counts = np.zeros((6, SIZE), np.int64)
    builder = ProgramBuilder()
    for row, pieces in enumerate([(0, 0), (1, 0), (3, 1), (7, 7), (64, 48), (2000, 5)]):
        args = words(int(counts[row].ctypes.data), SIZE)
        builder.add(kernel(jit, "test_count"), args, tag=row, pieces=pieces)
    program, runs = builder.build(), 0
    for threads in (2, 1, 5, 3, 2):
        with Pool(jit, ISA, threads, cpus=[w % 2 for w in range(threads)]) as pool:
            for _ in range(20):
                pool.run(program.records)
                runs += 1
                assert (counts == runs).all()


def test_who_is_free_does_the_pieces_of_who_is_not(jit: Jit) -> None:
    """Worker 0 is held up in the record before; worker 1 does all pieces that 0 has not kept."""
    flag, counts = ctypes.c_int64(0), np.zeros(100, np.int64)
    builder = ProgramBuilder()
    builder.add(kernel(jit, "test_hang"), words(ctypes.addressof(flag)), tag=0)
    args = words(int(counts.ctypes.data), len(counts))
    builder.add(kernel(jit, "test_count"), args, tag=1, pieces=(10, 8))
    program = builder.build()
    with Pool(jit, ISA, 2) as pool:
        runner = threading.Thread(target=pool.run, args=(program.records,))
        runner.start()
        deadline = time.monotonic() + 10
        while counts.sum() < 60 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert counts.tolist() == [0] * 40 + [1] * 60
        flag.value = 1
        runner.join()
    assert (counts == 1).all()


def test_the_tsc_runs_at_a_plausible_rate(jit: Jit) -> None:
    with Pool(jit, ISA, 1) as pool:
        assert 0.5e9 < pool.tsc_hz < 10e9


def test_wrong_arrays_are_refused(jit: Jit) -> None:
    with Pool(jit, ISA, 1) as pool:
        with pytest.raises(ValueError, match="records must be int64"):
            pool.run(np.zeros((1, 3), np.int64))
        with pytest.raises(ValueError, match="contiguous"):
            pool.run(np.zeros((4, 8), np.int64)[:, ::2])
        with pytest.raises(ValueError, match="trace must be int64"):
            pool.run(np.zeros((0, 4), np.int64), np.zeros((0, 3, 2), np.int64))


def test_workers_are_pinned_and_the_caller_is_not(jit: Jit) -> None:
    mask, others = os.sched_getaffinity(0), threading.enumerate()
    with Pool(jit, ISA, 2) as pool:
        pool.run(np.zeros((0, 4), np.int64))
        team = [t for t in threading.enumerate() if t not in others]
        pinned = [os.sched_getaffinity(t.native_id or 0) for t in team]
        assert pinned == [{cpu} for cpu in pool.cpus]
    assert os.sched_getaffinity(0) == mask


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_an_idle_pool_burns_no_cpu(jit: Jit, threads: int) -> None:
    with Pool(jit, ISA, threads) as pool:
        pool.run(np.zeros((0, 4), np.int64))
        time.sleep(0.02)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.02


def test_a_waiting_caller_burns_no_cpu(jit: Jit) -> None:
    flag = ctypes.c_int64(0)
    builder = ProgramBuilder()
    builder.add(kernel(jit, "test_hang"), words(ctypes.addressof(flag)), tag=0)
    program = builder.build()
    used: list[float] = []

    def call(pool: Pool) -> None:
        before = time.thread_time()
        pool.run(program.records)
        used.append(time.thread_time() - before)

    with Pool(jit, ISA, 1) as pool:
        thread = threading.Thread(target=call, args=(pool,))
        thread.start()
        time.sleep(0.3)
        flag.value = 1
        thread.join()
    assert used[0] < 0.05


def test_hundreds_of_start_stop_cycles_leave_nothing(jit: Jit) -> None:
    records = np.zeros((0, 4), np.int64)
    before = threading.active_count()
    for cycle in range(300):
        pool = Pool(jit, ISA, 1 + cycle % 3)
        if cycle % 2:
            pool.run(records)
        pool.close()
        pool.close()
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/task")) <= before + 8  # threads of libraries


def test_a_dropped_pool_ends_its_threads(jit: Jit) -> None:
    before = threading.active_count()
    pool = Pool(jit, ISA, 2)
    pool.run(np.zeros((0, 4), np.int64))
    del pool
    gc.collect()
    assert threading.active_count() == before


def test_a_closed_pool_refuses(jit: Jit) -> None:
    pool = Pool(jit, ISA, 1)
    pool.close()
    with pytest.raises(WorkerError, match="closed"):
        pool.run(np.zeros((0, 4), np.int64))


def test_two_threads_may_share_a_pool(jit: Jit) -> None:
    several = [np.random.default_rng(i).integers(0, 1 << 60, (5, 200)) for i in range(2)]
    made = [random_program(jit, buffers, 500, seed=i) for i, buffers in enumerate(several)]
    with Pool(jit, ISA, 2) as pool:
        threads = [
            threading.Thread(target=pool.run, args=(program.records,)) for program, _ in made
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for buffers, (_, expected) in zip(several, made, strict=True):
        np.testing.assert_array_equal(buffers, expected)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_is_reported(jit: Jit, victim: int) -> None:
    buffers = np.ones((3, SIZE), np.int64)
    builder = ProgramBuilder()
    mix = kernel(jit, "test_mix")
    add_mix(builder, mix, buffers, 0, 1, 2, 1)
    builder.add(kernel(jit, "test_exit"), words(victim), tag=1)
    add_mix(builder, mix, buffers, 2, 1, 0, 1)
    program = builder.build()
    pool = Pool(jit, ISA, 3)
    with pytest.raises(WorkerError, match=rf"worker {victim} .* died"):
        pool.run(program.records)
    with pytest.raises(WorkerError, match="died"):
        pool.run(program.records)
    pool.close()


def test_a_worker_that_cannot_be_pinned_is_reported(jit: Jit) -> None:
    absent = os.cpu_count() or 1
    with (
        Pool(jit, ISA, cpus=[0, absent + 500]) as pool,
        pytest.raises(WorkerError, match="cannot be pinned"),
    ):
        pool.run(np.zeros((0, 4), np.int64))


HUNG = """
import gc, signal, sys, threading, time, weakref
sys.path.insert(0, {folder!r})
import test_pool as t
from hmc.codegen.jit import Jit
from hmc.errors import WorkerError
from hmc.runtime.host import pool as home
from hmc.runtime.memory.blocks import Block

class Owner:
    def __init__(self):
        self.memory = Block(8, "a word nobody sets")

t.ARGS.update(t.TEST_ARGS)
jit = Jit({{**t.EMITTERS, "test_hang": t.emit_hang, "test_exit": t.emit_exit}})
home._RECORD_SECONDS, home._LEAVE_SECONDS, home._JOIN_SECONDS = {limits}
pool = t.Pool(jit, t.ISA, 2)
owner = Owner()
pool.uses(owner)
builder = t.ProgramBuilder()
builder.add(t.kernel(jit, "test_exit"), t.words(-1), tag=41)
builder.add(t.kernel(jit, "test_hang"), t.words(owner.memory.address), tag=4711)
builder.add(t.kernel(jit, "test_exit"), t.words(-1), tag=42, alone=True)
records = builder.build().records

def run():
    try:
        pool.run(records)
    except WorkerError as error:
        print(error, flush=True)

print("ready", flush=True)
{scene}
"""

HANGS = {
    "while it runs": (
        "0.3, 60, 0.1",
        "run()\nrun()\nassert pool.left_behind\nkept = weakref.ref(owner)\n"
        "del pool, owner, records, builder\ngc.collect()\nassert kept() is not None",
    ),
    "after Ctrl-C": (
        "60, 0.3, 0.1",
        "threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()\nrun()",
    ),
    "at exit": (
        "60, 0.3, 0.1",
        "threading.Thread(target=run, daemon=True).start()\ntime.sleep(0.2)",
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("moment", HANGS)
def test_a_process_with_a_worker_that_hangs_ends(moment: str) -> None:
    """Nobody ever frees the worker."""
    limits, scene = HANGS[moment]
    script = HUNG.format(folder=str(Path(__file__).parent), limits=limits, scene=scene)
    done = subprocess.run(
        [sys.executable, "-c", script], timeout=60, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert len(said) == {"while it runs": 3, "after Ctrl-C": 2, "at exit": 1}[moment]
    for line in said[1:]:
        assert re.search(r"worker 0 .* record 1 \(tag 4711\) for more than 0.3 s", line)


INTERRUPTED = """
import signal, sys, threading, time
sys.path.insert(0, {folder!r})
import numpy as np
import test_pool as t
from hmc.codegen.jit import Jit

t.ARGS.update(t.TEST_ARGS)
jit = Jit({{**t.EMITTERS, "test_mix": t.emit_mix}})
buffers = np.random.default_rng(0).integers(0, 1 << 60, (6, 503))
program, _ = t.random_program(jit, buffers, {records}, seed=3)
pool = t.Pool(jit, t.ISA, 2)
start = buffers.copy()
pool.run(program.records)
expected = buffers.copy()
caught = 0
print("ready", flush=True)
while caught < {interrupts}:
    try:
        while True:
            buffers[:] = start
            ran = False
            ran = True
            pool.run(program.records)
            assert (buffers == expected).all()
    except KeyboardInterrupt:
        # However the call ended, nothing writes any more.
        seen = buffers.copy()
        time.sleep(0.002)
        assert (buffers == seen).all()
        caught += 1
        print("caught", flush=True)
pool.run(np.zeros((0, 4), np.int64))
{ending}
assert threading.active_count() == 1
print("clean", flush=True)
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("ending", ["pool.close()", "del pool"])
def test_ctrl_c_at_random_moments_leaves_no_thread(tmp_path: Path, ending: str) -> None:
    interrupts = 25
    folder = str(Path(__file__).parent)
    script = INTERRUPTED.format(folder=folder, records=400, interrupts=interrupts, ending=ending)
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    choose = random.Random(0)
    line = child.stdout.readline()
    for _ in range(interrupts):
        time.sleep(choose.random() * 0.02)
        child.send_signal(signal.SIGINT)
        line = child.stdout.readline()
        if line != "caught\n":
            break
    out, errors = child.communicate(timeout=60)
    assert (line, out) == ("caught\n", "clean\n"), errors
    assert child.returncode == 0


def test_a_forgotten_pool_does_not_keep_the_process(tmp_path: Path) -> None:
    script = (
        "import numpy as np\n"
        "from hmc.codegen.jit import Jit\n"
        "from hmc.codegen.isa import best_isa\n"
        "from hmc.codegen.kernels import EMITTERS\n"
        "from hmc.runtime.host.pool import Pool\n"
        "pool = Pool(Jit(EMITTERS), best_isa(), 2)\n"
        "pool.run(np.zeros((0, 4), np.int64))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], timeout=60, check=False, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
