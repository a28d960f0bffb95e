"""The GPU side, through PyTorch: pinned copies alone and both ways, device memory, BF16 and FP8
matmuls, attention, launches. Hides streams and events.

Timed by the host's clock between two waits for the device (copies that overlap: by the events of
their stream), so passes are long. The same code runs on PyTorch's CPU device: so it is tested
without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from hmc.bench.probe.result import Effort, Measurement
from hmc.machine.model import Gpu, GpuRates

_LAUNCHES = 500
_HEADS, _WIDTH = 32, 128
_FP8_CAPABILITY = (8, 9)


def probe_gpus(effort: Effort) -> tuple[tuple[Gpu, ...], list[Measurement]]:
    """Every GPU that PyTorch finds, with its rates, and all that was measured."""
    if not torch.cuda.is_available():
        return (), []
    gpus, found = [], []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        measured = Device(torch.device("cuda", number), effort).measure()
        found += measured
        rates = gpu_rates(measured)
        gpus.append(
            Gpu(name=properties.name, memory_bytes=int(properties.total_memory), rates=rates)
        )
    if len(gpus) > 1:
        found += links(effort)
    return tuple(gpus), found


def gpu_rates(found: Sequence[Measurement]) -> GpuRates:
    """Measurements of one GPU as rates."""
    return GpuRates.model_validate({each.what.removeprefix("gpu "): each.rate() for each in found})


class Device:
    """One device and what it reaches; `measure` gives everything in order."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device, self._effort = device, effort
        self._cuda = device.type == "cuda"
        self._bytes = effort.device_bytes
        side = 1024 * max(1, round((self._bytes / 2) ** 0.5 / 1024))
        self._side = side if self._cuda else 64

    def measure(self) -> list[Measurement]:
        """All rates of the device."""
        found = [*self._copies(), self._memory(), self._matmul(torch.bfloat16)]
        if self._cuda and _has_fp8(self.device.index):
            found.append(self._matmul(torch.float8_e4m3fn))
        return [*found, self._attention(), *self._launches(), self._sync()]

    # -- copies ------------------------------------------------------------------------------------

    def _copies(self) -> list[Measurement]:
        """Pinned copies to and from the device, alone and with the other way busy."""
        count = self._bytes
        host = [torch.ones(count, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        there = [torch.empty(count, dtype=torch.uint8, device=self.device) for _ in range(2)]
        ways = {"h2d": (there[0], host[0]), "d2h": (host[1], there[1])}
        streams = {way: self._stream() for way in ways}

        def copy(*order: str) -> None:
            for way in order:
                target, source = ways[way]
                with torch.cuda.stream(streams[way]) if self._cuda else nullcontext():
                    target.copy_(source, non_blocking=True)

        detail = f"pinned copies of {count / 1e6:.0f} MB on {self.device}"
        found = [
            Measurement(f"gpu {way}", "B/s", self._rates(count, partial(copy, way)), detail)
            for way in ways
        ]
        detail += ", the other way busy"
        for way, other in permutations(ways):
            # The other way stays busy from before until after the one that is timed.
            values = self._rates(count, partial(copy, other, way, other), streams[way])
            found.append(Measurement(f"gpu {way}_both", "B/s", values, detail))
        return found

    def _memory(self) -> Measurement:
        """Copies within the device: each byte is read and written."""
        a = torch.ones(self._bytes, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        values = self._rates(2 * self._bytes, lambda: b.copy_(a))
        return Measurement("gpu memory", "B/s", values, f"copies within {self.device}")

    # -- arithmetic --------------------------------------------------------------------------------

    def _matmul(self, form: torch.dtype) -> Measurement:
        """Square matmuls of BF16 or FP8."""
        side, fp8 = self._side, form == torch.float8_e4m3fn
        a = torch.randn((side, side), device=self.device).to(form)
        b = torch.randn((side, side), device=self.device).to(form)
        one = torch.ones((), device=self.device)

        def multiply() -> None:
            if fp8:
                torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
            else:
                torch.mm(a, b)

        name = "gpu fp8" if fp8 else "gpu bf16"
        values = self._rates(2 * side**3, multiply)
        return Measurement(name, "FLOP/s", values, f"matmul of {side} on {self.device}")

    def _attention(self) -> Measurement:
        tokens = 4096 if self._cuda else 64
        shape = (1, _HEADS, tokens, _WIDTH)
        q, k, v = (torch.randn(shape, device=self.device).bfloat16() for _ in range(3))
        pairs = tokens * (tokens + 1) / 2
        values = self._rates(
            4.0 * _HEADS * _WIDTH * pairs,
            lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        )
        detail = f"causal attention of {tokens} tokens, {_HEADS} heads of {_WIDTH}, {self.device}"
        return Measurement("gpu attention", "FLOP/s", values, detail)

    # -- latencies ---------------------------------------------------------------------------------

    def _launches(self) -> list[Measurement]:
        """Seconds a small kernel takes in a row of many, handed over one by one, and as a graph:
        what the thread takes, and what the device does beyond the work."""
        x = torch.zeros(1024, device=self.device)

        def many() -> None:
            for _ in range(_LAUNCHES):
                x.add_(1.0)

        replay = many
        if self._cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                many()
            replay = graph.replay
        detail = f"{_LAUNCHES} small kernels, {self.device}"
        ways = {"launch": (replay, f"{detail}, in a graph"), "hand_over": (many, detail)}
        return [
            Measurement(f"gpu {name}", "s", tuple(s / _LAUNCHES for s in self.wall(way)), told)
            for name, (way, told) in ways.items()
        ]

    def _sync(self) -> Measurement:
        """Seconds until a small pinned copy to the device is known to be done."""
        host = torch.zeros(1024, pin_memory=self._cuda)
        there = torch.zeros(1024, device=self.device)

        def copies() -> None:
            for _ in range(_LAUNCHES // 10):
                there.copy_(host, non_blocking=True)
                self._wait()

        values = tuple(10 * seconds / _LAUNCHES for seconds in self.wall(copies))
        return Measurement("gpu sync", "s", values, f"a copy of 4 kB and its wait, {self.device}")

    # -- clocks ------------------------------------------------------------------------------------

    def _stream(self) -> Any:
        return torch.cuda.Stream(self.device) if self._cuda else None  # type: ignore[no-untyped-call]

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def wall(self, work: Callable[[], object]) -> list[float]:
        """Seconds of the host's clock of every pass."""
        seconds = []
        for _ in range(self._effort.passes + 1):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def _rates(
        self, amount: float, work: Callable[[], object], stream: Any = None
    ) -> tuple[float, ...]:
        """`amount` a second of every pass, by events of `stream` where there is one."""
        if stream is None:
            return tuple(amount / seconds for seconds in self.wall(work))
        rates = []
        for _ in range(self._effort.passes + 1):
            self._wait()
            start, stop = _event(), _event()
            start.record(stream)
            work()
            stop.record(stream)
            self._wait()
            rates.append(amount / (start.elapsed_time(stop) / 1e3))
        return tuple(rates[1:])


def links(effort: Effort) -> list[Measurement]:
    """Copies from the first GPU to the second, large ones and a small one."""
    a = torch.ones(effort.device_bytes, dtype=torch.uint8, device="cuda:0")
    b = torch.empty(effort.device_bytes, dtype=torch.uint8, device="cuda:1")

    def seconds(count: int) -> list[float]:
        def copy() -> None:
            b[:count].copy_(a[:count])
            torch.cuda.synchronize(1)

        return Device(a.device, effort).wall(copy)

    large = tuple(effort.device_bytes / each for each in seconds(effort.device_bytes))
    return [
        Measurement("link", "B/s", large, "copies from GPU 0 to GPU 1, as PyTorch does them"),
        Measurement("link_latency", "s", tuple(seconds(4096)), "a copy of 4 kB, GPU 0 to GPU 1"),
    ]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _has_fp8(number: int) -> bool:
    return torch.cuda.get_device_capability(number) >= _FP8_CAPABILITY
