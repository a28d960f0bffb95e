"""Backends of devices: memory, streams and events, errors and closing; CUDA against a fake."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from null_device import NullBackend

from hmc.errors import CapacityError, ExecutionError, MachineError, WorkerError
from hmc.runtime.devices import cuda as cuda_module
from hmc.runtime.devices import cuda_flags as stream_memory
from hmc.runtime.devices import pinned
from hmc.runtime.devices.cuda import CudaBackend
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.devices.worker import delay

MAKERS: dict[str, Callable[[int, int], HostBackend | NullBackend]] = {
    "host": HostBackend,
    "null": lambda gpus, size: NullBackend(gpus, size, execute=True),
}


@pytest.fixture(params=sorted(MAKERS))
def backend(request: pytest.FixtureRequest) -> Iterator[HostBackend | NullBackend]:
    made = MAKERS[request.param](2, 10_000)
    yield made
    made.close()
    assert not _threads()


def _threads() -> list[str]:
    """Threads of streams; other tests of this process may keep an engine, with threads hmc-0..."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if re.fullmatch(r"hmc-(cpu|link|(gpu|h2d|d2h)\d+)", name)]


def _broken() -> None:
    raise ZeroDivisionError


# -- memory ----------------------------------------------------------------------------------------


def test_memory_is_aligned_counted_and_limited(backend: HostBackend | NullBackend) -> None:
    gpu, other = backend.devices
    assert (gpu.name, other.name) == ("gpu0", "gpu1")
    first = gpu.allocate(1000, "slots")
    second = gpu.allocate(257, "an arena")
    assert first.dtype == torch.uint8
    assert (first.numel(), second.numel()) == (1000, 257)
    assert first.data_ptr() % 256 == second.data_ptr() % 256 == 0
    assert gpu.used == 1024 + 512
    assert other.used == 0
    with pytest.raises(CapacityError, match=r"gpu0 cannot hold caches: 9,000 bytes.*8,464 free"):
        gpu.allocate(9000, "caches")
    gpu.free(first)
    gpu.free(second)
    assert gpu.used == 0
    gpu.free(gpu.allocate(0, "nothing"))
    gpu.allocate(9000, "caches")
    with pytest.raises(ExecutionError, match="not allocated here"):
        other.free(second)


def test_memory_that_the_system_refuses_is_a_capacity_error() -> None:
    backend = HostBackend(1, 1 << 62)
    with pytest.raises(CapacityError, match="cannot hold the moon"):
        backend.devices[0].allocate(1 << 61, "the moon")
    assert backend.devices[0].used == 0


# -- streams and events ----------------------------------------------------------------------------


def test_streams_work_in_order_and_wait_for_events(backend: HostBackend | NullBackend) -> None:
    done: list[str] = []
    load, compute = backend.stream("h2d0"), backend.stream("gpu0")
    assert backend.stream("gpu0") is compute
    on = backend.event()
    backend.begin()
    for turn in range(50):
        load.launch(lambda turn=turn: done.append(f"load {turn}"), "load")  # type: ignore[misc]
        load.record(on)
        compute.wait(on)
        compute.launch(lambda turn=turn: done.append(f"use {turn}"), "use")  # type: ignore[misc]
    backend.synchronize((compute,))
    backend.synchronize()
    assert [each for each in done if "load" in each] == [f"load {n}" for n in range(50)]
    for turn in range(50):
        assert done.index(f"load {turn}") < done.index(f"use {turn}")


def test_waiting_means_the_latest_record_made_so_far() -> None:
    backend = HostBackend(1, 0)
    gate = threading.Event()
    done: list[int] = []
    one, two, event = backend.stream("gpu0"), backend.stream("cpu"), backend.event()
    two.wait(event)  # recorded by nobody yet: no wait
    two.launch(lambda: done.append(0), "first")
    backend.synchronize((two,))
    one.record(event)
    one.launch(lambda: gate.wait(10) and None, "slow")
    two.wait(event)  # the record before the slow work, not the one after
    one.record(event)
    two.launch(lambda: done.append(1), "second")
    backend.synchronize((two,))
    assert done == [0, 1]
    two.wait(event)
    two.launch(lambda: done.append(2), "third")
    time.sleep(0.02)
    assert done == [0, 1]
    gate.set()
    backend.synchronize()
    assert done == [0, 1, 2]
    backend.close()


def test_unknown_streams_are_refused(backend: HostBackend | NullBackend) -> None:
    with pytest.raises(ExecutionError, match="no stream is called 'disk'"):
        backend.stream("disk")
    with pytest.raises(ExecutionError, match=r"only 2 GPU\(s\) are open"):
        backend.stream("h2d2")
    assert backend.stream("link").name == "link"


def test_the_null_clock_moves_with_waits_and_work() -> None:
    backend = NullBackend(1, 0)
    load, compute = backend.stream("h2d0"), backend.stream("gpu0")
    first, second, clock = backend.span(), backend.span(), backend.begin()
    event = backend.event()
    load.launch(lambda: pytest.fail("runs nothing"), "load", 2.5, first)
    load.record(event)
    compute.launch(lambda: None, "norm", 1.0)
    compute.wait(event)
    compute.launch(lambda: None, "use", 0.5, second)
    backend.synchronize()
    assert first.seconds(clock) == (0.0, 2.5)
    assert second.seconds(clock) == (2.5, 3.0)


def test_spans_of_the_host_are_measured() -> None:
    backend = HostBackend(1, 0)
    span = backend.span()
    clock = backend.begin()
    backend.stream("gpu0").launch(lambda: time.sleep(0.01), "nap", span=span)
    backend.synchronize()
    start, end = span.seconds(clock)
    assert 0 <= start < end
    assert end - start >= 0.01
    backend.close()


def test_delays_are_a_function_of_seed_stream_and_number() -> None:
    delays = [delay(7, "gpu0", number) for number in range(500)]
    assert delays == [delay(7, "gpu0", number) for number in range(500)]
    assert delays != [delay(8, "gpu0", number) for number in range(500)]
    assert delays != [delay(7, "h2d0", number) for number in range(500)]
    assert 0 <= min(delays) <= max(delays) <= 300e-6
    assert 10 < sum(each > 90e-6 for each in delays) < 150


# -- errors and closing ----------------------------------------------------------------------------


def test_the_first_error_stops_all_streams_and_reaches_synchronize() -> None:
    backend = HostBackend(1, 1000)
    backend.devices[0].allocate(100, "a slot")
    done: list[int] = []
    event = backend.event()
    bad, other = backend.stream("gpu0"), backend.stream("h2d0")
    gate = threading.Event()
    bad.launch(lambda: gate.wait(10) and None, "before")
    bad.launch(_broken, "division")
    bad.record(event)
    other.wait(event)
    other.launch(lambda: done.append(1), "never")
    gate.set()
    with pytest.raises(ExecutionError, match="division failed on gpu0: ZeroDivisionError"):
        backend.synchronize()
    assert done == []
    assert not _threads()
    assert backend.devices[0].used == 0
    with pytest.raises(ExecutionError, match="division failed"):
        other.launch(lambda: done.append(2), "later")


def test_the_null_backend_raises_at_once() -> None:
    backend = NullBackend(1, 0, execute=True)
    with pytest.raises(ExecutionError, match="division failed on gpu0: ZeroDivisionError"):
        backend.stream("gpu0").launch(_broken, "division")


def test_streams_that_wait_for_each_other_are_reported() -> None:
    backend = HostBackend(1, 0, timeout=0.1)
    event = backend.event()
    stream = backend.stream("gpu0")
    event.made = 1  # a record that never happens
    stream.wait(event)
    with pytest.raises(WorkerError, match=r"nothing ended for 0\.1 s: gpu0 waits for an event"):
        backend.synchronize()
    assert not _threads()


def test_work_longer_in_all_than_the_timeout_is_no_error() -> None:
    backend = HostBackend(1, 0, timeout=0.3)
    for _ in range(8):
        backend.stream("gpu0").launch(lambda: time.sleep(0.05), "nap")
    backend.synchronize()
    backend.close()


def test_calls_on_streams_of_their_own_do_not_wait_for_each_other() -> None:
    backend = HostBackend(1, 0, timeout=0.3)
    gate, done = threading.Event(), []
    aside = backend.stream("h2d0", aside=True)
    aside.launch(lambda: gate.wait(10) and None, "slow")
    aside.launch(lambda: done.append("slow"), "after")
    first, cpu = backend.stream("h2d0"), backend.stream("cpu")
    assert (aside.name, first.name) == ("h2d0.aside", "h2d0")
    assert backend.stream("cpu", aside=True).name == "cpu.aside"
    for number in range(20):
        first.launch(lambda number=number: done.append(number), "quick")  # type: ignore[misc]
        backend.synchronize((first, cpu))
    assert done == list(range(20))
    gate.set()
    backend.synchronize()
    assert done[-1] == "slow"
    backend.close()


def test_a_call_waits_for_what_was_handed_over_before_and_no_more() -> None:
    backend = HostBackend(1, 0)
    gate, done = threading.Event(), []
    cpu = backend.stream("cpu")
    cpu.launch(lambda: time.sleep(0.01) or done.append(1), "one")
    threading.Timer(0.05, lambda: cpu.launch(lambda: gate.wait(10) and None, "other")).start()
    backend.synchronize((cpu,))
    assert done == [1]
    time.sleep(0.05)
    other = threading.Thread(target=lambda: backend.synchronize((cpu,)))
    other.start()
    backend.synchronize((backend.stream("gpu0"),))
    assert other.is_alive()
    gate.set()
    other.join(10)
    backend.close()
    assert not other.is_alive()


@pytest.mark.parametrize("hung", [False, True])
def test_an_error_or_a_hang_of_one_call_is_raised_in_all(hung: bool) -> None:
    """A call that hangs is reported although another one goes on."""
    backend = HostBackend(1, 0, timeout=0.2)
    gate = threading.Event()
    aside, first = backend.stream("gpu0", aside=True), backend.stream("gpu0")
    aside.launch(lambda: gate.wait(10) and None, "nap")
    if not hung:
        aside.launch(_broken, "division")
    errors: list[BaseException] = []

    def call(stream: Any, again: bool) -> None:
        try:
            while again:
                stream.launch(lambda: time.sleep(1e-3), "quick")
                backend.synchronize((stream,))
            backend.synchronize((stream,))
        except ExecutionError as error:
            errors.append(error)
        except WorkerError as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=each) for each in ((aside, False), (first, True))]
    for thread in threads:
        thread.start()
    if not hung:
        gate.set()
    for thread in threads:
        thread.join(10)
    gate.set()
    said = r"nothing ended for 0\.2 s: gpu0\.aside is at nap" if hung else "division failed"
    assert [bool(re.search(said, str(error))) for error in errors] == [True, True]


def test_a_closed_backend_drops_work_and_takes_no_more() -> None:
    backend = HostBackend(1, 1000)
    gate, done = threading.Event(), []
    stream = backend.stream("gpu0")
    stream.launch(lambda: gate.wait(0.1) and None, "slow")
    stream.launch(lambda: done.append(1), "dropped")
    backend.close()
    backend.close()
    assert done == []
    assert not _threads()
    with pytest.raises(ExecutionError, match="were closed"):
        stream.launch(lambda: None, "late")


# -- CUDA, against a fake of what it calls ---------------------------------------------------------


class _FakeEvent:
    """An event of a device that is done with everything it was given at once."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.time = 0.0
        self._stream: Any = None

    def record(self, stream: Any) -> None:
        self._stream = stream
        self._log.append(f"{stream.name} records")
        self.time = time.perf_counter()

    def query(self) -> bool:
        return self._stream is None or self._stream.idle

    def synchronize(self) -> None:
        self._log.append("cpu waits for a device")

    def elapsed_time(self, other: _FakeEvent) -> float:
        return (other.time - self.time) * 1e3


class _FakeStream:
    def __init__(self, name: str, log: list[str], number: int = 0, priority: int = 0) -> None:
        self.name, self.priority = name, priority
        self.cuda_stream = number
        self.idle = True
        self._log = log

    def wait_event(self, event: _FakeEvent) -> None:
        self._log.append(f"{self.name} waits for a device")

    def query(self) -> bool:
        return self.idle

    def synchronize(self) -> None:
        assert self.idle


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda with one GPU of 1000 free bytes; `log` of what was asked of it."""
    log: list[str] = []
    streams: list[_FakeStream] = []

    def stream(device: int, priority: int = 0) -> _FakeStream:
        streams.append(_FakeStream(f"s{len(streams)}", log, len(streams), priority))
        return streams[-1]

    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "Stream": stream,
        "Event": lambda enable_timing=False: _FakeEvent(log),
        "stream": lambda stream: nullcontext(),
        "device": lambda number: nullcontext(),
        "current_stream": lambda number: _FakeStream("default", log),
        "mem_get_info": lambda device: (1000, 5000),
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return SimpleNamespace(log=log, streams=streams)


def test_without_cuda_opening_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"needs 1 GPU\(s\), and "):
        CudaBackend(1)
    with pytest.raises(MachineError, match="can be pinned only"):
        pinned.pin(4096, 4096)


def test_too_few_gpus_and_too_little_memory(cuda: SimpleNamespace) -> None:
    with pytest.raises(MachineError, match="needs 2 GPUs, this machine has 1"):
        CudaBackend(2)
    backend = CudaBackend(1)
    with pytest.raises(CapacityError, match="gpu0 cannot hold slots: 2,000 bytes asked, 1,000"):
        backend.devices[0].allocate(2000, "slots")


def test_events_cross_between_cpu_and_gpu(cuda: SimpleNamespace) -> None:
    backend = CudaBackend(1)
    cpu, gpu, load = (backend.stream(name) for name in ("cpu", "gpu0", "h2d0"))
    given, taken = backend.event(), backend.event()
    gate = threading.Event()
    span = backend.span()
    for _ in range(2):  # events and spans are used again
        gate.clear()
        cuda.log.clear()
        clock = backend.begin()
        gpu.launch(lambda: cuda.log.append("gpu works"), "gpu", span=span)
        gpu.record(given)
        cpu.wait(given)
        cpu.launch(lambda: gate.wait(10) and cuda.log.append("cpu works"), "cpu")
        cpu.record(taken)
        threading.Timer(0.03, gate.set).start()
        load.wait(given)
        load.wait(taken)  # the caller waits for the CPU
        load.launch(lambda: cuda.log.append("load works"), "load")
        backend.synchronize()
        log = [each for each in cuda.log if "records" not in each]
        assert log.index("cpu waits for a device") < log.index("cpu works")
        assert log[-2:] == ["cpu works", "load works"]
        assert "s1 waits for a device" in log
        start, end = span.seconds(clock)
        assert 0 <= start <= end
    backend.close()
    assert not _threads()


@pytest.fixture
def driver(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The driver's library: operations on memory are done at once, and noted in the log. GPUs see
    host memory 1 GiB further on."""
    shift = 1 << 30

    def pointer(found: Any, address: int, flags: int) -> int:
        found._obj.value = address + shift
        return 0

    def write(stream: int, address: int, value: int, flags: int) -> int:
        cuda.log.append(f"stream {stream} writes {value}")
        ctypes.c_uint32.from_address(address - shift).value = value
        return fake.status

    def wait(stream: int, address: int, value: int, flags: int) -> int:
        cuda.log.append(f"stream {stream} waits for {value}")
        return fake.status

    fake = SimpleNamespace(
        cuMemHostGetDevicePointer_v2=pointer,
        cuStreamWriteValue32_v2=write,
        cuStreamWaitValue32_v2=wait,
        status=0,
    )
    monkeypatch.setattr(stream_memory.ctypes, "CDLL", lambda name: fake)
    plain = lambda nbytes, purpose: torch.empty(nbytes, dtype=torch.uint8)  # noqa: E731
    monkeypatch.setattr(cuda_module, "pinned", plain)
    return fake


def test_streams_of_a_gpu_meet_the_cpu_at_flags(
    cuda: SimpleNamespace, driver: SimpleNamespace
) -> None:
    backend = CudaBackend(1)
    flags = backend.flags(3)
    gpu = backend.stream("gpu0")
    for epoch in (1, 2):
        cuda.log.clear()
        flags.advance()
        assert not flags.reached(2, flags.epoch)
        gpu.wait_flag(flags, 0)
        gpu.set_flag(flags, 2)
        assert cuda.log == [f"stream 1 waits for {epoch}", f"stream 1 writes {epoch}"]
        assert flags.reached(2, flags.epoch)
        assert not flags.reached(0, flags.epoch)
    backend.close()
    assert ctypes.c_uint32.from_address(flags.abort_address).value
    assert flags.reached(0, flags.epoch)  # streams that still wait go on


def test_a_gpu_waits_for_cpu_work_without_the_caller(
    cuda: SimpleNamespace, driver: SimpleNamespace
) -> None:
    backend = CudaBackend(1, timeout=5)
    cpu, load, event = backend.stream("cpu"), backend.stream("h2d0"), backend.event()
    gate = threading.Event()
    for turn in (1, 2):
        gate.clear()
        cuda.log.clear()
        cpu.launch(lambda: gate.wait(10) and None, "rows are put into pages")
        cpu.record(event)
        load.wait(event)  # does not hang: the gate is closed
        load.launch(lambda: cuda.log.append("handed over"), "copy")
        assert [each for each in cuda.log if "writes" not in each][-2:] == [
            f"stream {load.stream.cuda_stream} waits for {turn}",
            "handed over",
        ]
        assert not event.flag.reached(0, turn)
        gate.set()
        backend.synchronize()
        assert event.flag.reached(0, turn) and not event.flag.reached(0, turn + 1)
    cpu.record(event)
    backend.close()
    assert event.flag.reached(0, event.made)  # nobody waits for what was dropped


def test_link_launches_on_a_stream_of_its_own_on_every_gpu(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    current: list[str] = []

    @contextmanager
    def entered(stream: _FakeStream) -> Iterator[None]:
        current.append(stream.name)
        yield

    monkeypatch.setattr(torch.cuda, "stream", entered)
    backend = CudaBackend(3)
    link = backend.stream("link")
    link.launch(lambda: cuda.log.append(f"moves on {sorted(current)}"), "all_gather")
    assert current[-1] == link.stream.name == "s0"
    assert cuda.log == [
        "s0 records",
        "s1 waits for a device",
        "s2 waits for a device",
        "moves on ['s0', 's1', 's2']",
        "s1 records",
        "s0 waits for a device",
        "s2 records",
        "s0 waits for a device",
    ]


def test_a_driver_without_operations_on_memory_is_told(
    cuda: SimpleNamespace, driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.status = 801
    with pytest.raises(MachineError, match=r"cannot write a flag \(CUDA error 801\)"):
        CudaBackend(1).flags(1)
    driver.status = 0
    driver.cuStreamWriteValue32_v2 = lambda *arguments: 0
    with pytest.raises(MachineError, match="gpu0 writes no flags into host memory"):
        CudaBackend(1).flags(1)
    del driver.cuStreamWaitValue32_v2
    with pytest.raises(MachineError, match="driver has no cuStreamWaitValue32_v2: update it"):
        CudaBackend(1).flags(1)

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(stream_memory.ctypes, "CDLL", missing)
    with pytest.raises(MachineError, match=r"libcuda\.so\.1 cannot be loaded"):
        CudaBackend(1).flags(1)


def test_the_caller_waits_for_the_cpu_work_it_needs_and_no_more(cuda: SimpleNamespace) -> None:
    backend = CudaBackend(1, timeout=5)
    cpu, gpu, event = backend.stream("cpu"), backend.stream("gpu0"), backend.event()
    gate = threading.Event()
    cpu.launch(lambda: time.sleep(0.01), "needed")
    cpu.record(event)
    cpu.launch(lambda: gate.wait(10) and cuda.log.append("later"), "later")
    gpu.wait(event)
    assert "later" not in cuda.log
    gate.set()
    backend.synchronize()
    assert "later" in cuda.log
    backend.close()


class _FakeGraph:
    """A CUDA graph that notes what is asked of it. Works are done when they are captured."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self._log.append(f"begins in {pool}, {capture_error_mode}")

    def capture_end(self) -> None:
        self._log.append("ends")
        if "bad" in self._log:
            raise RuntimeError("a capture that is invalid already")

    def replay(self) -> None:
        self._log.append("replays")


def test_works_become_a_graph_of_a_gpu(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = iter(["pool 1", "pool 2"])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _FakeGraph(cuda.log))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    backend = CudaBackend(1)
    gpu = backend.stream("gpu0")

    def collects() -> None:
        cuda.log.append(f"collects: {gc.isenabled()}")

    def bad() -> None:
        cuda.log.append("bad")
        raise RuntimeError("operation not permitted\nwhen a stream is capturing")

    graph = gpu.graph([lambda: cuda.log.append("first"), collects], "norms")
    begins = "begins in pool 1, thread_local"
    assert cuda.log == [begins, "first", "collects: False", "ends"]
    cuda.log.clear()
    gpu.launch(graph, "norms")
    gpu.launch(graph, "norms")
    assert cuda.log == ["replays", "replays"]
    cuda.log.clear()
    with pytest.raises(ExecutionError, match=r"sums cannot be captured on gpu0: .*not permitted$"):
        gpu.graph([bad], "sums")
    assert cuda.log == [begins, "bad", "ends"]
    assert gc.isenabled()
    gpu.launch(lambda: cuda.log.append("goes on"), "sums")
    assert cuda.log[-1] == "goes on"
    cuda.log.clear()
    gpu.graph([lambda: None], "norms")  # the memory of what failed is not used again
    assert cuda.log == ["begins in pool 2, thread_local", "ends"]
    backend.close()


def test_errors_on_a_gpu(cuda: SimpleNamespace) -> None:
    backend = CudaBackend(1, timeout=0.1)
    gpu = backend.stream("gpu0")

    def full() -> None:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(CapacityError, match="scores on gpu0 found no memory"):
        gpu.launch(full, "scores")
    with pytest.raises(ExecutionError, match="division failed on gpu0: ZeroDivisionError"):
        gpu.launch(_broken, "division")
    cuda.streams[0].idle = False
    threading.Timer(0.3, lambda: setattr(cuda.streams[0], "idle", True)).start()
    with pytest.raises(WorkerError, match=r"gpu0 did not end within 0\.1 s"):
        backend.synchronize()


def test_streams_aside_give_way_and_an_error_ends_all_calls(cuda: SimpleNamespace) -> None:
    backend = CudaBackend(1, timeout=5)
    aside, first = backend.stream("gpu0", aside=True), backend.stream("gpu0")
    assert [each.priority for each in cuda.streams] == [0, -1]
    cuda.streams[0].idle = False
    backend.synchronize((first, backend.stream("cpu")))  # the other one is at work
    threading.Timer(0.02, lambda: backend.close(ExecutionError("gone"))).start()
    threading.Timer(0.1, lambda: setattr(cuda.streams[0], "idle", True)).start()
    with pytest.raises(ExecutionError, match="gone"):
        backend.synchronize((aside,))


def test_an_error_on_the_cpu_reaches_the_caller_that_waits(cuda: SimpleNamespace) -> None:
    backend = CudaBackend(1)
    event = backend.event()
    cpu = backend.stream("cpu")
    cpu.launch(lambda: time.sleep(0.01) or _broken(), "division")
    cpu.record(event)
    with pytest.raises(ExecutionError, match="division failed on cpu"):
        backend.stream("gpu0").wait(event)
    assert not _threads()


def test_pinning_explains_a_refusal(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    status = 0

    def answer(*arguments: Any) -> int:
        calls.append(arguments)
        return status

    runtime = SimpleNamespace(cudaHostRegister=answer, cudaHostUnregister=answer)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    pinned.pin(4096, 8192)
    pinned.unpin(4096)
    assert [each[:2] for each in calls] == [(4096, 8192), (4096,)]
    status = 2
    limit = (65_536, 65_536)
    monkeypatch.setattr(pinned.resource, "getrlimit", lambda kind: limit)
    with pytest.raises(MachineError, match=r"100,000 bytes .*is 65,536 bytes; raise it"):
        pinned.pin(4096, 100_000)
    limit = (pinned.resource.RLIM_INFINITY,) * 2
    with pytest.raises(MachineError, match=r"error 2\): free host memory"):
        pinned.pin(4096, 100_000)
    with pytest.raises(ExecutionError, match="0x1000 cannot be released"):
        pinned.unpin(4096)
