"""A phase becomes a native program for the pool.

The table `HOST_OPS` (runtime/host/ops.py) says what each step's kernels are called with; this
module collects their records and runs the result for any number of tokens: a program is built once,
and only the `tokens` word of its records changes. The records from the gather on work on the rows
whose logits are wanted, so their `tokens` word is another; when no row is wanted the program is
walked up to there. Where Python must look at what a record made (routing that is counted), the
program is walked in pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hmc.codegen.arguments import ARGS, pack
from hmc.codegen.decode.tiles import GRAIN
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec
from hmc.errors import ExecutionError
from hmc.plan import Operand, Phase, Plan, Step
from hmc.runtime.host.arena import Arena
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import Program, ProgramBuilder
from hmc.runtime.host.tables import Tables
from hmc.runtime.host.trace import Recorder
from hmc.runtime.memory.kv import KVCache
from hmc.runtime.routing import RoutingRecorder
from hmc.runtime.weights.store import WeightStore

if TYPE_CHECKING:
    from hmc.runtime.devices.flags import Flags


_PIECE_BYTES = 128 << 10
"""Least bytes of a piece: every call of a kernel first brings its inputs into order."""
_LEAST_PIECES, _MOST_PIECES = 4, 32
_DRAWN = 0.25
"""Part of its pieces that a worker leaves to whoever is free."""

Ints = npt.NDArray[np.int32]


class Parts:
    """What the phases of a plan have in common: weights, cache, tables, kernels and workers."""

    def __init__(self, plan: Plan, store: WeightStore, kv: KVCache, jit: Jit, pool: Pool) -> None:
        self.plan, self.store, self.kv, self.jit, self.pool = plan, store, kv, jit, pool
        self.tables = Tables(plan, store)


@dataclass(frozen=True)
class Screen:
    """A head of which the best rows alone may be computed: the records [start, stop) of all of it,
    and of the best; how many each wanted row asks for, i32 [max_tokens], at most `most`; of each
    worker rows computed so far and blocks of rows read whole, i64 [workers, ...].
    """

    whole: tuple[int, int]
    some: tuple[int, int]
    best: Ints
    counts: npt.NDArray[np.int64]
    most: int

    def asked(self, best: Ints | None, rows: int) -> bool:
        """Whether the best rows will do, of which `best` (None: all) of each of `rows` wanted rows
        are; they are noted then.
        """
        if best is None or not rows or best.min() < 1 or best.max() > self.most:
            return False
        self.best[:rows] = best
        return True


class Lowering:
    """Collects the records of a phase; what an op function of runtime/host/ops.py works with."""

    def __init__(
        self,
        parts: Parts,
        phase: Phase,
        routing: RoutingRecorder | None = None,
        arena: Arena | None = None,
    ) -> None:
        """In `arena`, which somebody else owns, or one of its own."""
        self.plan, self.store = parts.plan, parts.store
        self.kv, self.tables = parts.kv, parts.tables
        self.phase, self.workers, self.routing = phase, parts.pool.workers, routing
        self.team_table = parts.pool.team_table
        self.arena = arena or Arena(phase, parts.pool.teams)
        self.stops: list[Stop] = []
        self.split: int | None = None
        """Records that work on all tokens; None: all of them."""
        self.screen: Screen | None = None
        self._jit, self._pool = parts.jit, parts.pool
        self._builder = ProgramBuilder(len(parts.pool.teams))

    def specs(self, step: Step) -> dict[str, KernelSpec]:
        """The kernels of a step by op."""
        found = [self.plan.kernels[key] for key in step.kernels if not key.startswith("torch:")]
        return {spec.op: spec for spec in found}

    def add(
        self,
        step: Step,
        spec: KernelSpec,
        *,
        reads: Iterable[Operand | Hashable],
        writes: Iterable[Operand | Hashable],
        shared: tuple[int, int] = (0, 0),
        **args: int | float,
    ) -> None:
        """Append a record. `reads` and `writes` name operands, or workspaces and caches by any
        other name.

        `tokens` is filled in when the program runs. Where a kernel that works in pieces reads many
        bytes of weights in so many rows (`shared`), workers read them in pieces, so that they
        finish at the same time although memory does not serve them alike.
        """
        if "tokens" in (arg.name for arg in ARGS[spec.op]):
            args["tokens"] = 0
        kernel = self._jit.get(spec)
        read = [self.arena.touched(x) if isinstance(x, Operand) else {x} for x in reads]
        written = [self.arena.overwritten(x) if isinstance(x, Operand) else {x} for x in writes]
        self._builder.add(
            kernel,
            pack(spec.op, **args),
            tag=step.id,
            reads=frozenset().union(*read),
            writes=frozenset().union(*written),
            pieces=_pieces(*shared, self.workers),
        )

    def python(self, step: Step, function: Callable[[int], None]) -> None:
        """Have Python called for a step, with the number of tokens, when all records so far are
        done."""
        self.stops.append((self.records, step, function))

    def run(self, spec: KernelSpec, **args: int | float) -> None:
        """Run a kernel now, by all workers, for what is made once."""
        builder = ProgramBuilder()
        builder.add(self._jit.get(spec), pack(spec.op, **args), tag=0)
        self._pool.run(builder.build().records)

    def await_flag(self, step: Step, flags: Flags, number: int, spin: int) -> None:
        """Append a wait for a flag, before the records of a step; workers spin so many ticks."""
        kernel = self._jit.get(KernelSpec.of("flag_wait", self.plan.isa))
        self._builder.await_flag(
            kernel, flags.address(number), flags.abort_address, spin, tag=step.id
        )

    def set_flag(self, step: Step, flags: Flags, number: int) -> None:
        """Append what sets a flag, after the records of a step."""
        kernel = self._jit.get(KernelSpec.of("flag_set", self.plan.isa))
        self._builder.set_flag(kernel, flags.address(number), tag=step.id)

    @property
    def records(self) -> int:
        """Records of the program so far."""
        return len(self._builder)

    def build(self) -> Program:
        """The program of all records."""
        return self._builder.build()

    def rows_begin(self) -> None:
        """From here on, records work on the wanted rows instead of all tokens."""
        self.split = self.records


Stop = tuple[int, Step, Callable[[int], None]]
"""Records before it, the step that it is for, and what is done there."""

OpFunction = Callable[[Lowering, Step], None]
OpFunctions = Callable[[str], OpFunction]
"""The function of an op: `host_op` of runtime/host/ops.py."""


class LoweredPhase:
    """A phase ready to run: fill `arena`'s arrays, `run`, read its logits."""

    def __init__(self, lowering: Lowering, ops: OpFunctions, pool: Pool) -> None:
        """Lower every step by `ops`; `KernelError` when a kernel cannot be built."""
        self.name = lowering.phase.name
        self.max_tokens = lowering.phase.max_tokens
        self.arena = lowering.arena
        for step in lowering.phase.steps:
            ops(step.op)(lowering, step)
        self.program = lowering.build()
        self._split = len(self.program) if lowering.split is None else lowering.split
        self._stops = lowering.stops
        self._screen, self._best = lowering.screen, 0
        self._counts = (-1, -1, False)
        """What the `tokens` words of the records on all tokens and on the wanted rows hold, and
        whether the best ones will do."""
        keys = {key for step in lowering.phase.steps for key in step.kernels}
        native = {kernel.spec.symbol for kernel in self.program.kernels}
        self.kernels = tuple(sorted(native | {key for key in keys if key.startswith("torch:")}))
        """Symbols of the native kernels in this phase, and the names of what PyTorch computes."""
        self._pool = pool
        self.ran = False
        self.recorder: Recorder | None = None

    def run(
        self,
        ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        tables: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        best: Ints | None = None,
    ) -> npt.NDArray[np.float32]:
        """Logits f32 [len(rows), vocab] of the tokens at index `rows`; a view that the next run
        overwrites. Of row i all but the best[i] largest, and what ties with the last of them, may
        be -inf (None, or 0 in one of them: of no row).

        `ids`, `positions`, `tables` (block table row of each) are i32 [tokens].
        """
        tokens = len(ids)
        if not 0 < tokens <= self.max_tokens or len(rows) > self.max_tokens:
            raise ExecutionError(
                f"phase {self.name} takes 1..{self.max_tokens} tokens, not {tokens}"
            )
        self.arena.enter(ids, positions, tables)
        self.arena.inputs("rows")[: len(rows)] = rows
        some = self._screen is not None and self._screen.asked(best, len(rows))
        records, start = self._ready(tokens, len(rows), some), 0
        for stop, step, function in self._stops:
            if stop <= len(records):
                self._walk(records[start:stop])
                self._call(step, partial(function, tokens), function.__name__)
                start = stop
        self._walk(records[start:])
        self.ran = True
        self._best += some * len(rows)
        return self.arena.logits[: len(rows)]

    @property
    def screened(self) -> Counter[str]:
        """Of a head that is screened: `logits`, wanted rows of which the best were asked for so
        far, `rows` of the matrix computed for them, and `blocks` of its rows read whole.
        """
        if self._screen is None:
            return Counter()
        rows, blocks = self._screen.counts[:, :2].sum(axis=0).tolist()
        return Counter(logits=self._best, rows=rows, blocks=blocks)

    def _ready(self, tokens: int, rows: int, some: bool) -> npt.NDArray[np.int64]:
        """The records to walk for so many tokens and wanted rows, of all logits or `some`."""
        end = len(self.program) if rows else self._split
        wanted = (tokens, rows or self._counts[1], some if rows else self._counts[2])
        if self._counts != wanted:
            self._counts = (-1, -1, False)  # Ctrl-C may strike between any two of these lines
            for start, stop, count in ((0, self._split, tokens), (self._split, end, rows)):
                if start < stop:
                    self.program.patch_all(start, stop, tokens=count)
            if self._screen is not None and rows:
                away = self._screen.whole if some else self._screen.some
                self.program.patch_all(*away, tokens=0)
            self._counts = wanted if rows else (tokens, -1, False)
        return self.program.records[:end]

    def _call(self, step: Step, function: Callable[[], None], name: str) -> None:
        if self.recorder is None:
            function()
        else:
            self.recorder.call(self.name, step, function, name)

    def _walk(self, records: npt.NDArray[np.int64]) -> None:
        if not len(records):
            return
        if self.recorder is None:
            self._pool.run(records)
        else:
            self.recorder.run(self.name, records)


def screened(phases: Iterable[object]) -> Counter[str]:
    """The sums of `LoweredPhase.screened` of those among some phases that are lowered."""
    return sum((each.screened for each in phases if isinstance(each, LoweredPhase)), Counter())


def _pieces(size: int, rows: int, workers: int) -> tuple[int, int]:
    """In how many pieces a worker's share of `size` bytes is cut, and how many of them are its own;
    none is smaller than the kernels split.
    """
    count = min(size // _PIECE_BYTES, rows // GRAIN) // workers
    if workers == 1 or count < _LEAST_PIECES:
        return 0, 0
    count = min(count, _MOST_PIECES)
    return count, count - round(count * _DRAWN)
