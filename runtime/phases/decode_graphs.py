"""Decode calls whose GPU steps are handed over as graphs: CUDA graphs, or what stands for them.

    graphs = DecodeGraphs(bound, runner)
    if graphs.take(tables, rows):
        graphs.run(ids, positions, tables, rows)

A graph has the shapes and addresses of the call it was captured with. Calls of as many tokens, the
longest context of which has the same *bucket* (a power of two), share index tensors, which each of
them overwrites, and so the graphs. The first calls of such a key go step by step, which loads
kernels; the next one is captured before it begins; the keys used last are kept. Where a device
refuses, decoding goes on step by step.

Hides keys, what is kept of them, and when to capture.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from hmc.errors import ExecutionError
from hmc.runtime.binding.phase import BoundPhase
from hmc.runtime.device_ops.shares import Call, Fixed, Ints
from hmc.runtime.schedule.runner import Orders, ScheduleRunner

LEAST_BUCKET = 256
"""Positions that attention looks at, at least: padding costs less than another graph."""
FIRST = 2
"""Calls of a key that go step by step: one at least, and about as many as a capture takes the time
of, so that keys which soon change cost little more than they would without graphs."""
KEPT = 8
"""Keys whose graphs are kept. Their number bounds the memory of index tensors and of what a graph
takes itself; temporaries lie in memory that all of them share."""


class _Kept:
    """What is kept of a key: its tensors, how many calls have run, and the graphs."""

    def __init__(self, longest: int) -> None:
        self.fixed = Fixed(longest)
        self.ran = 0
        self.orders: Orders | None = None


class DecodeGraphs:
    """The graphs of one decode phase."""

    def __init__(self, bound: BoundPhase, runner: ScheduleRunner) -> None:
        self._bound, self._runner = bound, runner
        self._kept: OrderedDict[tuple[int, int, int], _Kept] = OrderedDict()
        self.replayed = 0
        """Calls that were run with graphs."""
        self.refused = ""
        """Why there are no graphs, in words, once a device could not make them."""

    @property
    def told(self) -> str:
        """Whether there are graphs, in words."""
        if self.refused:
            return f"{self._bound.phase.name}: GPU steps are handed over one by one: {self.refused}"
        runs = len(self._runner.segments)
        return f"{self._bound.phase.name}: {runs} runs of GPU steps handed over as graphs"

    def take(self, tables: Ints, rows: Ints) -> bool:
        """Whether a call is one for graphs: with a token each of several sequences, or of one, and
        something to do for every step."""
        tokens = len(tables)
        return (
            not self.refused
            and len(rows) > 0
            and tokens >= self._bound.phase.lanes
            and len(np.unique(tables)) == tokens
        )

    def run(self, ids: Ints, positions: Ints, tables: Ints, rows: Ints) -> Call:
        """Make a call and run it; raises as `BoundPhase.call` and `ScheduleRunner.run_untimed`."""
        longest = bucket(int(positions.max()) + 1, self._bound.plan.limits.max_context)
        key = len(ids), len(rows), longest
        kept = self._kept.setdefault(key, _Kept(longest))
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        call = self._bound.call(ids, positions, tables, rows, kept.fixed)
        if kept.ran >= FIRST and kept.orders is None:
            self._capture(kept, call)
        self._runner.run_untimed(call, kept.orders)
        kept.ran += 1
        self.replayed += kept.orders is not None
        return call

    def _capture(self, kept: _Kept, call: Call) -> None:
        try:
            kept.orders = self._runner.graphs(call)
        except ExecutionError as error:
            self.refused = str(error)
            self._kept.clear()


def bucket(longest: int, limit: int) -> int:
    """Positions, at most `limit`, that a call is padded to whose longest context has `longest`."""
    return min(max(LEAST_BUCKET, 1 << (longest - 1).bit_length()), limit)
