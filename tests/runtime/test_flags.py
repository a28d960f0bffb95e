"""Flags: native programs that meet threads by them, and what becomes of both when a call is given
up.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from kernel_meanings import flag_reached
from null_device import NullBackend

from hmc.codegen.arguments import pack
from hmc.codegen.isa import best_isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.pool.walker import BARRIER, GATE
from hmc.codegen.spec import KernelSpec
from hmc.errors import WorkerError
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import Program, ProgramBuilder

WORDS = 999


@pytest.fixture(scope="module")
def jit() -> Jit:
    return Jit(EMITTERS)


@pytest.fixture(scope="module", params=[1, 3])
def pool(request: pytest.FixtureRequest, jit: Jit) -> Iterator[Pool]:
    with Pool(jit, best_isa(), cpus=[0] * request.param) as found:
        yield found


def program(jit: Jit, flags: Flags, arrays: list[np.ndarray]) -> Program:
    """Fills every array with its flag's number when flag 2n is set, and then sets flag 2n + 1."""
    isa = best_isa().name
    wait, done, fill = (
        jit.get(KernelSpec.of(op, isa)) for op in ("flag_wait", "flag_set", "stream_fill")
    )
    builder = ProgramBuilder()
    for number, array in enumerate(arrays):
        builder.await_flag(wait, flags.address(2 * number), flags.abort_address, 10_000, tag=number)
        values = pack("stream_fill", base=array.ctypes.data, size=array.nbytes, value=number)
        builder.add(fill, values, tag=number, writes=[number])
        builder.set_flag(done, flags.address(2 * number + 1), tag=number)
    return builder.build()


def within(seconds: float, flags: Flags, number: int) -> None:
    until = time.monotonic() + seconds
    while not flags.reached(number, flags.epoch):
        assert time.monotonic() < until, f"flag {number} is never set"
        time.sleep(0)


def test_gates_are_followed_by_one_barrier(jit: Jit) -> None:
    flags, array = Flags(3), np.zeros(8, np.int64)
    isa = best_isa().name
    wait, fill = (jit.get(KernelSpec.of(op, isa)) for op in ("flag_wait", "stream_fill"))
    values = pack("stream_fill", base=array.ctypes.data, size=64, value=1)
    builder = ProgramBuilder()
    for number in (0, 1):
        builder.await_flag(wait, flags.address(number), flags.abort_address, 0, tag=0)
    builder.add(fill, values, tag=0, writes="a")
    builder.add(fill, values, tag=0, writes="b")
    assert builder.build().records[:, 2].tolist() == [GATE, GATE, BARRIER, 0]


def test_a_program_and_a_thread_take_turns_for_thousands_of_calls(jit: Jit, pool: Pool) -> None:
    flags, arrays = Flags(6), [np.zeros(WORDS, np.int64) for _ in range(3)]
    made = program(jit, flags, arrays)
    flags.epoch = (1 << 32) - 1000  # epochs begin again at 0 on the way
    flags._words[:] = flags.epoch
    flags._words[-1] = 0
    seen: list[bool] = []

    def device(calls: int) -> None:
        for _ in range(calls):
            begin.wait(10)
            for number, array in enumerate(arrays):
                array[:] = -1
                flags.set(2 * number, flags.epoch)
                within(10, flags, 2 * number + 1)
                seen.append(bool((array == number).all()))
            end.wait(10)

    begin, end = threading.Barrier(2), threading.Barrier(2)
    calls = 2000
    thread = threading.Thread(target=device, args=(calls,))
    thread.start()
    for _ in range(calls):
        flags.advance()
        made.patch_all(epoch=flags.epoch)
        begin.wait(10)
        assert pool.run(made.records)
        end.wait(10)
    thread.join()
    assert len(seen) == 3 * calls
    assert all(seen)
    assert flags.epoch == calls - 1000


def test_a_call_that_is_given_up_ends_where_it_waits(jit: Jit, pool: Pool) -> None:
    for turn in range(40):
        flags, arrays = Flags(6), [np.full(WORDS, -1, np.int64) for _ in range(3)]
        made = program(jit, flags, arrays)
        flags.advance()
        made.patch_all(epoch=flags.epoch)
        reached = turn % 3
        for number in range(reached):
            flags.set(2 * number, flags.epoch)

        def give_up(flags: Flags = flags, done: int = reached, later: int = turn % 4) -> None:
            if later:  # what was let through is done before
                for number in range(done):
                    within(5, flags, 2 * number + 1)
            time.sleep(1e-3 * later)
            flags.abort()

        threading.Thread(target=give_up).start()
        start = time.monotonic()
        assert not pool.run(made.records)
        assert time.monotonic() - start < 5
        assert ctypes.c_uint32.from_address(flags.abort_address).value
        for number, array in enumerate(arrays):
            assert (array == (number if number < reached else -1)).all() or not turn % 4
        # the pool is as good as before
        again = program(jit, Flags(6), [])
        assert pool.run(again.records)


def test_a_waiting_program_sleeps(jit: Jit, pool: Pool) -> None:
    flags, arrays = Flags(2), [np.zeros(WORDS, np.int64)]
    made = program(jit, flags, arrays)
    flags.advance()
    made.patch_all(epoch=flags.epoch)
    threading.Timer(0.4, lambda: flags.set(0, flags.epoch)).start()
    before = time.process_time()
    assert pool.run(made.records)
    assert time.process_time() - before < 0.2


def test_epochs_are_compared_as_the_kernel_does() -> None:
    flags = Flags(1)
    for word, epoch in [
        (0, 1),
        (1, 1),
        (5, 1),
        (0, (1 << 32) - 1),
        ((1 << 32) - 1, 0),
        (7, 1 << 31),
    ]:
        flags.set(0, word)
        assert flags.reached(0, epoch) == flag_reached(word, epoch), (word, epoch)


# -- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_streams_meet_at_flags(seed: int) -> None:
    backend = HostBackend(1, 0, delays=seed)
    flags = backend.flags(1)
    one, two = backend.stream("gpu0"), backend.stream("h2d0")
    done: list[str] = []
    for turn in range(5):
        flags.advance()
        two.wait_flag(flags, 0)
        two.launch(partial(done.append, f"second {turn}"), "second")
        one.launch(partial(done.append, f"first {turn}"), "first")
        one.set_flag(flags, 0)
        backend.synchronize()
    backend.close()
    assert done == [f"{which} {n}" for n in range(5) for which in ("first", "second")]


def test_a_flag_that_nobody_sets_is_reported_in_time() -> None:
    backend = HostBackend(1, 0, timeout=0.2)
    flags = backend.flags(2)
    flags.advance()
    backend.stream("gpu0").wait_flag(flags, 1)
    with pytest.raises(WorkerError, match=r"nothing ended for 0\.2 s: gpu0 waits for flag 1"):
        backend.synchronize()
    assert ctypes.c_uint32.from_address(flags.abort_address).value
    assert all(flags.reached(number, flags.epoch) for number in (0, 1))


def test_the_null_clock_moves_with_flags() -> None:
    backend = NullBackend(1, 0)
    flags, span = backend.flags(2), backend.span()
    load, compute = backend.stream("h2d0"), backend.stream("gpu0")
    clock = backend.begin()
    flags.advance()
    load.launch(lambda: None, "load", 2.5)
    load.set_flag(flags, 1)
    compute.wait_flag(flags, 0)
    compute.wait_flag(flags, 1)
    compute.launch(lambda: None, "use", 0.5, span)
    assert span.seconds(clock) == (2.5, 3.0)
