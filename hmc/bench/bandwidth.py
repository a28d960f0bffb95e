"""The references of benchmarks, what this machine gives at best: streaming reads, from memory or
from L2, and register-only multiply-adds.

The reference for every bandwidth figure is the best of a sweep, since a naive read loop reaches
half of what the memory gives. Rates drift by half within minutes on shared machines, so benchmarks
do not quote the sweep: they time its best variant again between the passes of whatever they
measure.
"""

from __future__ import annotations

import itertools
import mmap
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hmc.bench.compare import Report, silent
from hmc.codegen.arguments import pack
from hmc.codegen.isa import Isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.probes.peak import dot_peak_flops
from hmc.codegen.kernels.probes.stream import PAGES, SPLIT
from hmc.codegen.spec import KernelSpec
from hmc.errors import CapacityError
from hmc.machine.detect import available_bytes
from hmc.machine.topology import this_machine
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import Program, ProgramBuilder

_HUGE_PAGE = 2 << 20
_PASSES = 3
_ORDERS = {SPLIT: "split", PAGES: "pages"}


@dataclass(frozen=True, order=True)
class Variant:
    """One way to read: streams a worker, bytes prefetched ahead, access order
    (codegen/kernels/probes/stream.py), page size."""

    streams: int
    prefetch: int
    order: int
    huge: bool

    def spec(self, isa: Isa) -> KernelSpec:
        """The kernel that reads so."""
        tile = {"prefetch": self.prefetch, "order": self.order}
        return KernelSpec.of("stream_read", isa.name, streams=self.streams, tile=tile)

    def __str__(self) -> str:
        pages = "2 MiB" if self.huge else "4 KiB"
        order = _ORDERS[self.order]
        return f"{self.streams} streams, prefetch {self.prefetch}, {order}, {pages} pages"


SWEEP: tuple[Variant, ...] = tuple(
    Variant(streams, prefetch, order, huge)
    for huge, order, streams, prefetch in itertools.product(
        (False, True),
        (SPLIT, PAGES),
        (1, 2, 4, 8),
        (0, 512, 2048, 4096, 8192, 16384),
    )
)


class StreamingRead:
    """Buffers far beyond the last-level cache (`size` bytes each; default 1 GiB or 8 x the cache),
    ready to be read.

    Pages are touched by the workers that will read them, so every share lies on its worker's NUMA
    node. Memory goes back when the object does. `CapacityError` when two buffers, one of large and
    one of small pages, do not fit the memory that is free.
    """

    def __init__(self, pool: Pool, jit: Jit, isa: Isa, size: int | None = None) -> None:
        self.size = size or max(1 << 30, 8 * this_machine().last_level_bytes)
        needed, free = 2 * self.size, available_bytes()
        if needed > free:
            raise CapacityError(
                f"streaming reads need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are"
                " free: measure less (--layers, --megabytes, --quick)"
            )
        self._pool, self._jit, self._isa = pool, jit, isa
        self._buffers: dict[bool, np.ndarray] = {}
        self.sinks = np.zeros(pool.workers, np.int64)
        self._programs: dict[tuple[Variant, int], Program] = {}

    def once(self, variant: Variant) -> float:
        """Bytes/s of one pass over the buffer."""
        return self.once_over(variant, self._buffer(variant.huge).ctypes.data, self.size)

    def once_of(self, other: StreamingRead, variant: Variant) -> float:
        """The same over another's buffer: each worker's share lies where the other's worker of that
        number touched it."""
        address = other._buffer(variant.huge).ctypes.data
        return self.once_over(variant, address, min(self.size, other.size))

    def once_over(self, variant: Variant, address: int, size: int, times: int = 1) -> float:
        """Bytes/s of one pass, `times` over `size` bytes of the caller's own at `address` (whose
        pages are what they are): the reference over the very bytes a kernel reads."""
        if (variant, times) not in self._programs:
            args = pack("stream_read", base=0, size=0, sink=self.sinks.ctypes.data)
            program = repeated(self._jit, variant.spec(self._isa), args, times)
            self._programs[variant, times] = program
        program = self._programs[variant, times]
        program.patch_all(base=address, size=size)
        trace = np.zeros((times, self._pool.workers, 2), np.int64)
        self._pool.run(program.records, trace)
        return times * size / self._pool.seconds(trace)

    def medians(
        self, variants: Iterable[Variant], repetitions: int, rate: Callable[[Variant], float]
    ) -> dict[Variant, float]:
        """Median `rate` of each variant over `repetitions` passes, variants taking turns."""
        rates: dict[Variant, list[float]] = {variant: [] for variant in variants}
        for variant in rates:
            rate(variant)  # builds the kernel and touches the buffer
        for _ in range(repetitions):
            for variant, seen in rates.items():
                seen.append(rate(variant))
        return {variant: statistics.median(seen) for variant, seen in rates.items()}

    def sweep(
        self, variants: Sequence[Variant] = SWEEP, repetitions: int = 7
    ) -> dict[Variant, float]:
        """Median bytes/s of the ways to read memory, by successive halving; the eight left at the
        end get `repetitions` passes.

        A variant's figure is the median of the last round it took part in; one that dropped out is
        capped at the slowest finalist, so that a lucky minute of an early round never becomes the
        reference.
        """
        rates = self.medians(variants, 2, self.once)
        for survivors, passes in ((len(variants) // 4, 3), (8, repetitions)):
            ranked = sorted(rates, key=lambda variant: rates[variant], reverse=True)
            again = self.medians(ranked[: max(8, survivors)], passes, self.once)
            slowest = min(again.values())
            rates = {variant: min(rate, slowest) for variant, rate in rates.items()} | again
        self._buffers.clear()  # from here on one of them is enough
        return rates

    def _buffer(self, huge: bool) -> np.ndarray:
        if huge not in self._buffers:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, self.size + _HUGE_PAGE, flags=flags)
            memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
            whole = np.frombuffer(memory, np.uint8)
            shift = -whole.ctypes.data % _HUGE_PAGE
            buffer = whole[shift : shift + self.size]
            args = pack("stream_fill", base=buffer.ctypes.data, size=self.size, value=1)
            spec = KernelSpec.of("stream_fill", self._isa.name)
            self._pool.run(repeated(self._jit, spec, args).records)
            self._buffers[huge] = buffer
        return self._buffers[huge]


class MemoryReference(StreamingRead):
    """The fastest way this pool's workers read memory: found once by the full sweep, then timed
    again whenever it is asked for.
    """

    def __init__(
        self,
        pool: Pool,
        jit: Jit,
        isa: Isa,
        *,
        megabytes: int = 0,
        variants: Sequence[Variant] = SWEEP,
        report: Report = silent,
    ) -> None:
        """Runs the sweep. `megabytes` (10^6 bytes) is what a pass reads; 0: as `StreamingRead`."""
        super().__init__(pool, jit, isa, megabytes * 1_000_000 or None)
        report("finding the fastest streaming read", 0, 1)
        self.swept = self.sweep(variants)
        report("finding the fastest streaming read", 1, 1)
        self.variant = max(self.swept, key=lambda variant: self.swept[variant])
        self.once(self.variant)

    def rate(self) -> float:
        """Bytes/s over its own buffer: median of three passes."""
        return statistics.median(self.once(self.variant) for _ in range(_PASSES))

    def rate_over(self, address: int, size: int) -> float:
        """Bytes/s of one pass over `size` bytes at `address`, which lie in huge pages; over its own
        buffer when small pages are the faster ones."""
        if not self.variant.huge:
            return self.once(self.variant)
        return self.once_over(self.variant, address, size)


def cache_rate(
    pool: Pool, jit: Jit, isa: Isa, address: int, size: int, times: int
) -> Callable[[], float]:
    """Bytes/s of one pass in the fastest way one worker reads `size` bytes at `address` that stay
    in its L2, `times` over in a pass.
    """
    reader = StreamingRead(pool, jit, isa, size)

    def rate(variant: Variant) -> float:
        return reader.once_over(variant, address, size, times)

    few = [each for each in SWEEP if each.huge and each.prefetch in (0, 512, 2048)]
    rates = reader.medians(few, _PASSES, rate)
    return partial(rate, max(rates, key=lambda variant: rates[variant]))


def dot_peak(pool: Pool, jit: Jit, isa: Isa, *, repetitions: int = 7) -> float:
    """Multiply-add peak of all workers together, FLOP/s (median): `vdpbf16ps` or f32 FMA, by
    tier."""
    spec = KernelSpec.of("dot_peak", isa.name)
    sink = np.zeros(pool.workers, np.float32)
    rounds = 50_000
    program = repeated(jit, spec, pack("dot_peak", rounds=rounds, sink=sink.ctypes.data))
    trace = np.zeros((1, pool.workers, 2), np.int64)
    flops = rounds * dot_peak_flops(spec) * pool.workers
    rates = []
    for _ in range(repetitions + 1):
        pool.run(program.records, trace)
        rates.append(flops / pool.seconds(trace))
    return statistics.median(rates[1:])


def repeated(jit: Jit, spec: KernelSpec, args: bytes, times: int = 1) -> Program:
    """A program of one record, `times` over."""
    builder = ProgramBuilder()
    for _ in range(times):
        builder.add(jit.get(spec), args, tag=0)
    return builder.build()
