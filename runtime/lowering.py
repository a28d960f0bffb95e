"""A phase becomes segments: native programs for the pool, and Python calls where PyTorch or sorting
is needed.

The table `OPS` (runtime/ops.py) says what each step's kernels are called with; this module collects
their records, cuts programs where Python must step in, and runs the result for any number of
tokens: programs are built once, and only the `tokens` word of their records changes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from hmc.codegen.jit import Jit
from hmc.codegen.spec import ARGS, KernelSpec, pack
from hmc.errors import ExecutionError
from hmc.plan import Kernel, Operand, Phase, Plan, Step
from hmc.runtime.arena import Arena
from hmc.runtime.kv import KVCache, Sequence
from hmc.runtime.pool import Pool
from hmc.runtime.program import Program, ProgramBuilder
from hmc.runtime.routing import RoutingRecorder
from hmc.runtime.tables import Tables
from hmc.runtime.trace import Recorder
from hmc.runtime.weights import WeightStore


@dataclass(frozen=True)
class Call:
    """One run of a phase: `tokens` inputs, `rows` of them wanted as logits; prefill: `sequence`
    after `past` tokens.
    """

    tokens: int
    rows: int
    sequence: Sequence | None = None
    past: int = 0


PythonStep = Callable[[Call], None]


@dataclass
class _Segment:
    """Work done in one go; `per_row` segments run on the wanted rows, and not at all when none are
    wanted.
    """

    work: Program | PythonStep
    per_row: bool
    tokens: int = -1
    step: int = -1


class Lowering:
    """Collects the records of a phase; what an op function of runtime/ops.py works with."""

    def __init__(
        self,
        plan: Plan,
        phase: Phase,
        store: WeightStore,
        kv: KVCache,
        tables: Tables,
        jit: Jit,
        workers: int,
        routing: RoutingRecorder | None = None,
    ) -> None:
        self.plan, self.phase, self.store, self.kv, self.tables = plan, phase, store, kv, tables
        self.workers, self.routing = workers, routing
        self.arena = Arena(phase)
        self.segments: list[_Segment] = []
        self._jit = jit
        self._builder = ProgramBuilder()
        self._empty = True
        self._per_row = False

    def specs(self, step: Step) -> dict[str, KernelSpec]:
        """The kernels of a step by op."""
        found = [
            spec_of(self.plan.kernels[key]) for key in step.kernels if not key.startswith("torch:")
        ]
        return {spec.op: spec for spec in found}

    def add(
        self,
        step: Step,
        spec: KernelSpec,
        *,
        reads: Iterable[Operand | Hashable],
        writes: Iterable[Operand | Hashable],
        **args: int | float,
    ) -> None:
        """Append a record. `reads` and `writes` name operands, or workspaces and caches by any
        other name.

        `tokens` is filled in when the program runs.
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
        )
        self._empty = False

    def python(self, step: Step, function: PythonStep) -> None:
        """Append a call for a step, made after all records so far are done."""
        self._cut()
        self.segments.append(_Segment(function, self._per_row, step=step.id))

    def rows_begin(self) -> None:
        """From here on, records work on the wanted rows instead of all tokens."""
        self._cut()
        self._per_row = True

    def finish(self) -> list[_Segment]:
        """All segments in order."""
        self._cut()
        return self.segments

    def _cut(self) -> None:
        if not self._empty:
            self.segments.append(_Segment(self._builder.build(), self._per_row))
        self._builder, self._empty = ProgramBuilder(), True


OpFunction = Callable[[Lowering, Step], None]


class LoweredPhase:
    """A phase ready to run: fill `arena`'s arrays, `run`, read its logits."""

    def __init__(self, lowering: Lowering, ops: Mapping[str, OpFunction], pool: Pool) -> None:
        """Lower every step by `ops`; `KernelError` when a kernel cannot be built."""
        self.name = lowering.phase.name
        self.max_tokens = lowering.phase.max_tokens
        self.arena = lowering.arena
        for step in lowering.phase.steps:
            ops[step.op](lowering, step)
        self._segments = lowering.finish()
        self._keys = {key for step in lowering.phase.steps for key in step.kernels}
        self._pool = pool
        self.ran = False
        self.recorder: Recorder | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        """Symbols of the native kernels in this phase, and the names of what PyTorch computes."""
        native = {
            kernel.spec.symbol
            for segment in self._segments
            if isinstance(segment.work, Program)
            for kernel in segment.work.kernels
        }
        return tuple(sorted(native | {key for key in self._keys if key.startswith("torch:")}))

    @property
    def programs(self) -> tuple[Program, ...]:
        """The native programs, in order; tags are step ids."""
        return tuple(s.work for s in self._segments if isinstance(s.work, Program))

    def run(
        self,
        ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        tables: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        sequence: Sequence | None = None,
    ) -> npt.NDArray[np.float32]:
        """Logits f32 [len(rows), vocab] of the tokens at index `rows`; a view that the next run
        overwrites.

        `ids`, `positions`, `tables` (block table row of each) are i32 [tokens]; `sequence` is the
        one all tokens belong to, for a prefill.
        """
        tokens = len(ids)
        if not 0 < tokens <= self.max_tokens or len(rows) > self.max_tokens:
            raise ExecutionError(
                f"phase {self.name} takes 1..{self.max_tokens} tokens, not {tokens}"
            )
        self.arena.inputs("ids")[:tokens] = ids
        self.arena.inputs("positions")[:tokens] = positions
        self.arena.inputs("rows")[: len(rows)] = rows
        self.arena.sequence[:tokens] = tables
        self.arena.span[1] = tokens
        call = Call(tokens, len(rows), sequence, int(positions[0]))
        for segment in self._segments:
            count = call.rows if segment.per_row else call.tokens
            if count:
                self._run(segment, count, call)
        self.ran = True
        return self.arena.logits[: len(rows)]

    def _run(self, segment: _Segment, count: int, call: Call) -> None:
        work = segment.work
        if not isinstance(work, Program):
            if self.recorder is None:
                work(call)
            else:
                self.recorder.call(self.name, segment.step, partial(work, call), work.__name__)
            return
        if segment.tokens != count:
            segment.tokens = -1  # Ctrl-C may strike between the two lines that follow
            work.patch_all(tokens=count)
            segment.tokens = count
        if self.recorder is None:
            self._pool.run(work.records)
        else:
            self.recorder.run(self.name, work.records)


def spec_of(kernel: Kernel) -> KernelSpec:
    """The spec that a plan's kernel spells out."""
    return KernelSpec(
        kernel.op,
        kernel.isa,
        kernel.weight,
        kernel.out,
        kernel.params,
        kernel.tile,
    )
