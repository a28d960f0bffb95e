"""Rates of single kernels, each pass interleaved with a pass of its reference.

`linear` and `experts` (1 to 16 tokens) are held against the fastest streaming read of the very
bytes they read; `gemm` and `grouped` (prefill) against register-only multiply-adds. A pass goes
through more weights than the caches hold, or with `l2` over one matrix in the L2 of one core, again
and again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from hmc.bench.cases import DECODE_OPS, PREFILL_OPS, Case, Row, cut_to_cache
from hmc.bench.compare import Compared, Report, interleave, silent
from hmc.bench.matrices import Matrices
from hmc.bench.reference import CacheReference, MemoryReference, PeakReference
from hmc.closing import Closing
from hmc.codegen.expr import SWIGLU
from hmc.codegen.isa import Isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.kernels.matmul.experts import scratch_bytes
from hmc.codegen.kernels.matmul.gemm import gemm_scratch_bytes
from hmc.codegen.kernels.matmul.grouped import grouped_scratch_bytes
from hmc.codegen.spec import MAX_TOKENS, KernelSpec, pack
from hmc.errors import ExecutionError, UsageError
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import Program, ProgramBuilder
from hmc.runtime.memory.blocks import Block

DEFAULT_MEGABYTES = 640
"""Weights of a pass, in 10^6 bytes."""

_PASS_FLOPS = 2e11  # a prefill pass need not go through all of the buffer to be well beyond caches
_L2_PASS_BYTES = 64 << 20


class KernelBench(Closing):
    """Pool and references of one run; a context manager. `isa` may be any tier the machine has.

    `l2` measures on one core, from its L2. Without `barriers`, linear matrices follow each other
    without waiting, which shows what the barriers of a decode step cost.
    """

    def __init__(
        self, isa: Isa, *, threads: int | None = None, l2: bool = False, barriers: bool = True
    ) -> None:
        self.isa, self.l2, self._barriers = isa, l2, barriers and not l2
        self._jit = Jit(EMITTERS)
        self.pool = Pool(self._jit, isa, 1 if l2 else threads)
        self.reference: MemoryReference | None = None

    def close(self) -> None:
        """End the pool."""
        self.pool.close()

    def measure(
        self,
        cases: Sequence[Case],
        *,
        repetitions: int = 9,
        megabytes: int = DEFAULT_MEGABYTES,
        report: Report = silent,
    ) -> list[Row]:
        """A row for every case, in their order; cases next to each other share their weights.

        Raises `UsageError` for cases that cannot be run so, `CapacityError` for lack of memory.
        """
        if self.l2 and any(case.op != "linear" for case in cases):
            raise UsageError("--l2 measures --op linear alone")
        if not self.l2 and any(case.op in DECODE_OPS for case in cases):
            self.reference = MemoryReference(
                self.pool, self._jit, self.isa, megabytes=megabytes, report=report
            )
        if self.l2:
            cases = [cut_to_cache(case) for case in cases]
        rows = []
        for shapes, group in groupby(cases, key=lambda case: case.matrices):
            together = list(group)
            matrices = Matrices(shapes, self._count(together, megabytes), report)
            try:
                rows += [
                    Row(case, self._compare(case, matrices, repetitions, report))
                    for case in together
                ]
            finally:
                matrices.close()
        return rows

    def _count(self, cases: list[Case], megabytes: int) -> int:
        """Sets of matrices that make `megabytes`; experts: no fewer than a token needs."""
        if self.l2:
            return 1
        size = sum(shape.bytes for shape in cases[0].matrices)
        count = -(-megabytes * 1_000_000 // size)
        if cases[0].op in ("experts", "grouped"):
            return max(count, max(case.top_k for case in cases))
        return count

    def _compare(
        self, case: Case, matrices: Matrices, repetitions: int, report: Report
    ) -> Compared:
        work = _WORK[case.op](self, case, matrices)
        trace = np.zeros((len(work.program), self.pool.workers, 2), np.int64)

        def rate() -> float:
            self.pool.run(work.program.records, trace)
            return work.amount / self.pool.seconds(trace)

        rate()
        if not np.isfinite(work.result).all():
            raise ExecutionError(
                f"kernel {case.op} {case.format} {case.shape} gave a value not finite"
            )
        name = f"{case.op} {case.format} {case.shape} x {case.tokens}"
        return interleave(rate, self._reference(case, matrices), repetitions, name, report)

    def _reference(self, case: Case, matrices: Matrices) -> Callable[[], float]:
        if case.op in PREFILL_OPS:
            return PeakReference(self.pool, self._jit, self.isa).rate
        if self.l2:
            times = _L2_PASS_BYTES // matrices.size
            address, size = matrices.address, matrices.size
            return CacheReference(self.pool, self._jit, self.isa, address, size, times).rate
        memory = self.reference
        assert memory is not None
        return lambda: memory.rate_over(matrices.address, matrices.size)

    # -- programs ----------------------------------------------------------------------------------

    def linear(self, case: Case, matrices: Matrices) -> _Work:
        """Every matrix once, each after the one before as in a decode step; L2: one repeatedly."""
        spec = self._spec(case, "linear", {"k": case.k, "tokens": MAX_TOKENS})
        x = _activations(case.tokens, case.k)
        y = np.zeros((case.tokens, case.rows), np.float32)
        indices = np.arange(matrices.count)
        if self.l2:
            indices = np.zeros(_L2_PASS_BYTES // matrices.size, np.int64)
        builder = ProgramBuilder()
        for index in indices:
            args = pack(
                "linear",
                w=int(matrices.weights[index, 0]),
                scale=int(matrices.scales[index, 0]),
                **_xy(x, y),
            )
            writes = ("y",) if self._barriers else ()
            builder.add(self._jit.get(spec), args, tag=0, writes=writes)
        amount = len(indices) * matrices.set_bytes
        return _Work(builder.build(), amount, y, (x,))

    def gemm(self, case: Case, matrices: Matrices) -> _Work:
        """Matrix after matrix, on all tokens."""
        spec = self._spec(case, "gemm", {"k": case.k})
        x = _activations(case.tokens, case.k)
        y = np.zeros((case.tokens, case.rows), np.float32)
        scratch = self._scratch(gemm_scratch_bytes(spec))
        count = min(matrices.count, max(2, int(_PASS_FLOPS / case.flops)))
        builder = ProgramBuilder()
        for index in range(count):
            args = pack(
                "gemm",
                w=int(matrices.weights[index, 0]),
                scale=int(matrices.scales[index, 0]),
                gather=0,
                scratch=scratch.address,
                **_xy(x, y),
            )
            builder.add(self._jit.get(spec), args, tag=0, writes=("y",))
        return _Work(builder.build(), count * case.flops, y, (x, scratch))

    def experts(self, case: Case, matrices: Matrices) -> _Work:
        """Each (token, slot) has the next expert: a pass reads every expert, few of them twice."""
        experts, pairs = matrices.count, case.tokens * case.top_k
        sizes = {"experts": experts, "top_k": case.top_k, "tokens": MAX_TOKENS}
        into = self._spec(case, "experts_gate_up", _into(case) | sizes, "bf16", SWIGLU)
        back = self._spec(case, "experts_down", _back(case) | sizes)
        calls = -(-experts // pairs)
        ids = (np.arange(calls * pairs, dtype=np.int32) % experts).reshape(calls, -1)
        table = _table(matrices)
        x, y = _activations(case.tokens, case.k), np.zeros((case.tokens, case.k), np.float32)
        act = np.zeros((pairs, case.rows), np.uint16)
        routing = np.full(pairs, 1 / case.top_k, np.float32)
        scratch = Block(max(scratch_bytes(into), scratch_bytes(back)), "experts")
        common = {
            "table": table.ctypes.data,
            "act": act.ctypes.data,
            "tokens": case.tokens,
            "scratch": scratch.address,
        }
        builder = ProgramBuilder()
        for call in ids:
            where = {"ids": call.ctypes.data, **common}
            args = pack("experts_gate_up", x=x.ctypes.data, x_stride=case.k, **where)
            builder.add(self._jit.get(into), args, tag=0, writes=("act",))
            args = pack(
                "experts_down",
                y=y.ctypes.data,
                y_stride=case.k,
                routing=routing.ctypes.data,
                **where,
            )
            builder.add(self._jit.get(back), args, tag=1, reads=("act",), writes=("y",))
        amount = sum(len(set(call.tolist())) for call in ids) * matrices.set_bytes
        return _Work(builder.build(), amount, y, (x, act, ids, table, routing, scratch))

    def grouped(self, case: Case, matrices: Matrices) -> _Work:
        """One layer of all the experts there are, `top_k` of them drawn evenly for each token."""
        experts = matrices.count
        sizes = {"experts": experts, "top_k": case.top_k}
        into = self._spec(case, "grouped_gate_up", _into(case) | sizes, "bf16", SWIGLU)
        back = self._spec(case, "grouped_down", _back(case) | sizes)
        random = np.random.default_rng(0)
        ids = np.stack(
            [random.permutation(experts)[: case.top_k] for _ in range(case.tokens)]
        ).reshape(-1)
        slots = np.argsort(ids, kind="stable").astype(np.int32)
        offsets = np.zeros(experts + 1, np.int32)
        np.cumsum(np.bincount(ids, minlength=experts), out=offsets[1:])
        table = _table(matrices)
        x, y = _activations(case.tokens, case.k), np.zeros((case.tokens, case.k), np.float32)
        act = np.zeros((len(ids), case.rows), np.uint16)
        routing = np.full(len(ids), 1 / case.top_k, np.float32)
        scratch = self._scratch(max(grouped_scratch_bytes(into), grouped_scratch_bytes(back)))
        common = {
            "slots": slots.ctypes.data,
            "offsets": offsets.ctypes.data,
            "table": table.ctypes.data,
            "act": act.ctypes.data,
            "scratch": scratch.address,
        }
        builder = ProgramBuilder()
        args = pack("grouped_gate_up", x=x.ctypes.data, x_stride=case.k, **common)
        builder.add(self._jit.get(into), args, tag=0, writes=("act",))
        args = pack(
            "grouped_down",
            routing=routing.ctypes.data,
            y=y.ctypes.data,
            y_stride=case.k,
            tokens=case.tokens,
            **common,
        )
        builder.add(self._jit.get(back), args, tag=1, reads=("act",), writes=("y",))
        kept = (x, act, slots, offsets, table, routing, scratch)
        return _Work(builder.build(), case.flops, y, kept)

    def _spec(
        self, case: Case, op: str, sizes: Mapping[str, int], out: str = "f32", expr: str = ""
    ) -> KernelSpec:
        params = tuple(sorted({**sizes, **case.matrices[0].params}.items()))
        return KernelSpec(op, self.isa.name, case.format, out, params, expr=expr)

    def _scratch(self, bytes_per_worker: int) -> Block:
        return Block(self.pool.workers * bytes_per_worker, "scratch")


@dataclass(frozen=True)
class _Work:
    """A program, the bytes or FLOPs of one run, what it computes, and what its records point at."""

    program: Program
    amount: int
    result: npt.NDArray[np.float32]
    kept: tuple[object, ...]


_WORK: dict[str, Callable[[KernelBench, Case, Matrices], _Work]] = {
    "linear": KernelBench.linear,
    "gemm": KernelBench.gemm,
    "experts": KernelBench.experts,
    "grouped": KernelBench.grouped,
}


def _into(case: Case) -> dict[str, int]:
    return {"k": case.k, "n": case.rows}


def _back(case: Case) -> dict[str, int]:
    return {"k": case.rows, "n": case.k}


def _activations(tokens: int, k: int) -> npt.NDArray[np.uint16]:
    """bf16 [tokens, k], standard normal."""
    values = np.random.default_rng(0).standard_normal((tokens, k), np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _xy(x: npt.NDArray[np.uint16], y: npt.NDArray[np.float32]) -> dict[str, int]:
    return {
        "x": x.ctypes.data,
        "x_stride": x.shape[1],
        "y": y.ctypes.data,
        "y_stride": y.shape[1],
        "bias": 0,
        "rows": y.shape[1],
        "tokens": y.shape[0],
    }


def _table(matrices: Matrices) -> npt.NDArray[np.int64]:
    """i64 [experts, 6], as the expert kernels read it."""
    return np.ascontiguousarray(
        np.stack([matrices.weights, matrices.scales], axis=2).reshape(matrices.count, 6)
    )
