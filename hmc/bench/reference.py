"""The references of one benchmark run: streaming reads, from memory or from L2; hides the sweep."""

from __future__ import annotations

import statistics

import numpy as np

from hmc.bench.bandwidth import SWEEP, StreamingRead, Variant, repeated
from hmc.bench.compare import Report, silent
from hmc.codegen.isa import Isa
from hmc.codegen.jit import Jit
from hmc.codegen.spec import pack
from hmc.errors import CapacityError
from hmc.machine.detect import available_bytes
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import Program

_PASSES = 3


class MemoryReference:
    """The fastest way this pool's workers read memory: found once by the full sweep, then timed
    again whenever it is asked for.

    `megabytes` (10^6 bytes) is what a pass reads; 0: 1 GiB or 8 x the last-level cache.
    """

    def __init__(
        self,
        pool: Pool,
        jit: Jit,
        isa: Isa,
        *,
        megabytes: int = 0,
        report: Report = silent,
    ) -> None:
        """Runs the sweep; `CapacityError` when its buffers do not fit the memory that is free."""
        self._reader = StreamingRead(pool, jit, isa, megabytes * 1_000_000 or None)
        needed, free = 2 * self._reader.size, available_bytes()
        if needed > free:
            raise CapacityError(
                f"the streaming read needs {needed / 1e9:.1f} GB beside the weights,"
                f" {free / 1e9:.1f} GB are free: measure fewer layers, or lower --megabytes"
            )
        report("finding the fastest streaming read", 0, 1)
        self.sweep = self._reader.sweep()
        report("finding the fastest streaming read", 1, 1)
        self.variant = max(self.sweep, key=lambda variant: self.sweep[variant])
        self._reader.once(self.variant)

    def rate(self) -> float:
        """Bytes/s over its own buffer: median of three passes."""
        return statistics.median(self._reader.once(self.variant) for _ in range(_PASSES))

    def rate_over(self, address: int, size: int) -> float:
        """Bytes/s of one pass over `size` bytes at `address`, which lie in huge pages; over its own
        buffer when small pages are the faster ones."""
        if not self.variant.huge:
            return self._reader.once(self.variant)
        return self._reader.once_over(self.variant, address, size)


class CacheReference:
    """The fastest way one worker reads `size` bytes at `address` that stay in its L2, `times` over
    in a pass.
    """

    def __init__(self, pool: Pool, jit: Jit, isa: Isa, address: int, size: int, times: int) -> None:
        self._pool, self._bytes = pool, size * times
        self._sinks = np.zeros(pool.workers, np.int64)
        self._trace = np.zeros((times, pool.workers, 2), np.int64)
        args = pack("stream_read", base=address, size=size, sink=self._sinks.ctypes.data)
        programs = {
            variant: repeated(jit, variant.spec(isa), args, times)
            for variant in SWEEP
            if variant.huge and variant.prefetch in (0, 512, 2048)
        }
        rates: dict[Variant, list[float]] = {variant: [] for variant in programs}
        for _ in range(_PASSES):
            for variant, program in programs.items():
                rates[variant].append(self._once(program))
        self.variant = max(rates, key=lambda variant: statistics.median(rates[variant]))
        self._program = programs[self.variant]

    def rate(self) -> float:
        """Bytes/s of one pass."""
        return self._once(self._program)

    def _once(self, program: Program) -> float:
        self._pool.run(program.records, self._trace)
        return self._bytes / self._pool.seconds(self._trace)
