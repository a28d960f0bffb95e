"""Rates of single kernels, each pass interleaved with a pass of its reference.

`linear`, `experts` and `linear_attention` (1 to 16 tokens) are held against the fastest streaming
read of the very bytes they read; `gemm`, `grouped` and `linear_attention_prefill` against
register-only multiply-adds, of pairs of bf16 where the tier has them. A pass goes
through more weights than the caches hold, or with `l2` over one matrix in the L2 of one core, again
and again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import numpy.typing as npt

from hmc.bench.bandwidth import MemoryReference, cache_rate, dot_peak
from hmc.bench.cases import Case, MatrixShape, Row, cut_to_cache
from hmc.bench.compare import Compared, Report, in_turn, silent
from hmc.closing import Closing
from hmc.codegen.arguments import pack
from hmc.codegen.expr import SWIGLU
from hmc.codegen.isa import Isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.kernels.matmul.experts import scratch_bytes
from hmc.codegen.kernels.recurrent.linear_form import linear_scratch_bytes
from hmc.codegen.panel.tiling import panel_scratch_bytes
from hmc.codegen.spec import MAX_TOKENS, KernelSpec
from hmc.errors import CapacityError, ExecutionError, UsageError
from hmc.formats.decode import floats
from hmc.machine.detect import available_bytes
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import Program, ProgramBuilder
from hmc.runtime.memory.blocks import Block, aligned
from hmc.runtime.weights.fill import fill_dummy
from hmc.runtime.weights.tensors import TensorGroup

DEFAULT_MEGABYTES = 640
"""Weights of a pass, in 10^6 bytes."""

_PASS_FLOPS = 2e11  # a prefill pass need not go through all of the buffer to be well beyond caches
_L2_PASS_BYTES = 64 << 20


class Matrices(Closing):
    """`count` sets of matrices of the given `shapes`, random, laid out as the arena lays them, one
    set after the other in huge pages; many enough that a pass over all of them comes from memory.

    `weights` and `scales` are addresses i64 [count, shapes], of what lies beside the codes as
    kernels are told it: 0 where the format has nothing, of the addresses of several planes;
    `planes` are those of every plane of each shape, [count].
    `address` and `size` span them all.
    """

    def __init__(
        self, shapes: tuple[MatrixShape, ...], count: int, report: Report = silent
    ) -> None:
        self.shapes, self.count = shapes, count
        stride = sum(shape.stride for shape in shapes)
        self.set_bytes = sum(shape.bytes for shape in shapes)
        self.size = stride * count
        free = available_bytes()
        if self.size > free:
            raise CapacityError(
                f"{count} sets of weights need {self.size / 1e9:.1f} GB,"
                f" {free / 1e9:.1f} GB of memory are free: lower --megabytes"
            )
        self._block = Block(self.size, "weights to measure")
        self.address = self._block.address
        self.weights = np.zeros((count, len(shapes)), np.int64)
        self.scales = np.zeros((count, len(shapes)), np.int64)
        starts = self.address + stride * np.arange(count, dtype=np.int64)
        self.planes: list[list[npt.NDArray[np.int64]]] = []
        self._tables: list[npt.NDArray[np.int64]] = []
        groups: list[TensorGroup] = []
        places: dict[tuple[str | int, ...], npt.NDArray[np.int64]] = {}
        nowhere = np.zeros(count, np.int64)
        for index, shape in enumerate(shapes):
            planes = []
            for form in shape.forms:
                planes.append(starts)
                key = (form.plane.name, index)
                groups.append(TensorGroup(key, shape.format, form, nowhere, nowhere, shape.k))
                places[key] = starts
                starts = starts + aligned(form.bytes)
            self.planes.append(planes)
            self.weights[:, index], *beside = planes
            if len(beside) > 1:
                table = np.ascontiguousarray(np.stack(beside, axis=1))
                each = table.strides[0] * np.arange(count, dtype=np.int64)
                self.scales[:, index] = table.ctypes.data + each
                self._tables.append(table)
            elif beside:
                self.scales[:, index] = beside[0]
        fill_dummy(groups, places, report)

    def close(self) -> None:
        """Give the memory back."""
        self._block.close()


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
        if self.l2 and any(case.kind.many or case.kind.routed or case.kind.kept for case in cases):
            raise UsageError("--l2 measures --op linear alone")
        if not self.l2 and not all(case.kind.many for case in cases):
            self.reference = MemoryReference(
                self.pool, self._jit, self.isa, megabytes=megabytes, report=report
            )
        if self.l2:
            cases = [cut_to_cache(case) for case in cases]
        rows = []
        for shapes, group in groupby(cases, key=lambda case: case.matrices):
            together = list(group)
            with Matrices(shapes, self._count(together, megabytes), report) as matrices:
                rows += [
                    Row(case, self._compare(case, matrices, repetitions, report))
                    for case in together
                ]
        return rows

    def _count(self, cases: list[Case], megabytes: int) -> int:
        """Sets of matrices that make `megabytes`; experts: no fewer than a token needs."""
        if self.l2:
            return 1
        size = sum(shape.bytes for shape in cases[0].matrices)
        count = -(-megabytes * 1_000_000 // size)
        if cases[0].kind.routed:
            return max(count, max(case.top_k for case in cases))
        return count

    def product(
        self, case: Case, matrices: Matrices
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Activations [tokens, k] and what the kernel makes of them, of the first matrix."""
        work = self.dense(case, matrices)
        self.pool.run(work.program.records)
        return floats(_activations(case.tokens, case.k), "BF16"), work.result

    def _compare(
        self, case: Case, matrices: Matrices, repetitions: int, report: Report
    ) -> Compared:
        kind = case.kind
        make = self.routed if kind.routed else self.recurrent if kind.kept else self.dense
        work = make(case, matrices)
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
        reference = self._reference(case, matrices)
        (found,) = in_turn([rate], reference, repetitions, name, report)
        return found

    def _reference(self, case: Case, matrices: Matrices) -> Callable[[], float]:
        if case.kind.many:
            return partial(dot_peak, self.pool, self._jit, self.isa, repetitions=3)
        if self.l2:
            times = _L2_PASS_BYTES // matrices.size
            address, size = matrices.address, matrices.size
            return cache_rate(self.pool, self._jit, self.isa, address, size, times)
        memory = self.reference
        assert memory is not None
        return lambda: memory.rate_over(matrices.address, matrices.size)

    # -- programs ----------------------------------------------------------------------------------

    def dense(self, case: Case, matrices: Matrices) -> _Work:
        """Every matrix once, each after the one before as in a decode step; L2: one repeatedly."""
        many = case.kind.many
        indices = np.arange(matrices.count)
        if many:
            indices = indices[: max(2, int(_PASS_FLOPS / case.flops))]
        elif self.l2:
            indices = np.zeros(_L2_PASS_BYTES // matrices.size, np.int64)
        sizes = {} if many else {"tokens": MAX_TOKENS}
        spec = self._spec(case, case.op, {"k": case.k} | sizes)
        x = _activations(case.tokens, case.k)
        y = np.zeros((case.tokens, case.rows), np.float32)
        common = {"x": x.ctypes.data, "x_stride": case.k, "y": y.ctypes.data, "y_stride": case.rows}
        common |= {"bias": 0, "rows": case.rows, "tokens": case.tokens}
        kept: tuple[object, ...] = (x,)
        if many:
            scratch = Block(self.pool.workers * panel_scratch_bytes(spec), "scratch")
            common |= {"gather": 0, "scratch": scratch.address}
            kept = (x, scratch)
        writes = ("y",) if many or self._barriers else ()
        builder = ProgramBuilder()
        for index in indices:
            w, scale = int(matrices.weights[index, 0]), int(matrices.scales[index, 0])
            args = pack(case.op, w=w, scale=scale, **common)
            builder.add(self._jit.get(spec), args, tag=0, writes=writes)
        amount = len(indices) * (case.flops if many else matrices.set_bytes)
        return _Work(builder.build(), amount, y, kept)

    def routed(self, case: Case, matrices: Matrices) -> _Work:
        """In decode, each (token, slot) has the next expert: a pass reads every expert, few of them
        twice. In prefill, one layer of all the experts there are, `top_k` of them drawn evenly for
        each token.
        """
        experts, pairs, many = matrices.count, case.tokens * case.top_k, case.kind.many
        sizes = {"experts": experts, "top_k": case.top_k}
        if not many:
            sizes["tokens"] = MAX_TOKENS
        ends = {"k": case.k, "n": case.rows}
        into = self._spec(case, f"{case.op}_gate_up", ends | sizes, "bf16", SWIGLU)
        back = self._spec(case, f"{case.op}_down", {"k": case.rows, "n": case.k} | sizes)
        if many:
            calls = [_drawn(experts, case)]
            amount = case.flops
            worker = max(panel_scratch_bytes(into), panel_scratch_bytes(back))
            scratch = Block(self.pool.workers * worker, "scratch")
        else:
            ids = np.arange(-(-experts // pairs) * pairs, dtype=np.int32) % experts
            calls = [{"ids": each} for each in ids.reshape(-1, pairs)]
            amount = sum(len(np.unique(each["ids"])) for each in calls) * matrices.set_bytes
            scratch = Block(max(scratch_bytes(into), scratch_bytes(back)), "experts")
        # i64 [experts, 6], as the expert kernels read it
        table = np.stack([matrices.weights, matrices.scales], axis=2).reshape(experts, 6)
        x, y = _activations(case.tokens, case.k), np.zeros((case.tokens, case.k), np.float32)
        act = np.zeros((pairs, case.rows), np.uint16)
        routing = np.full(pairs, 1 / case.top_k, np.float32)
        first = {"x": x.ctypes.data, "x_stride": case.k, "routing": routing.ctypes.data}
        first |= {"gate_bias": 0, "up_bias": 0}
        second = {"y": y.ctypes.data, "y_stride": case.k, "routing": routing.ctypes.data}
        second |= {"tokens": case.tokens, "bias": 0}
        if not many:
            first |= {"tokens": case.tokens, "teams": 0}
        builder = ProgramBuilder()
        for call in calls:
            common = {name: each.ctypes.data for name, each in call.items()}
            common |= {"table": table.ctypes.data, "act": act.ctypes.data}
            common["scratch"] = scratch.address
            args = pack(into.op, **first, **common)
            builder.add(self._jit.get(into), args, tag=0, writes=("act",))
            args = pack(back.op, **second, **common)
            builder.add(self._jit.get(back), args, tag=1, reads=("act",), writes=("y",))
        return _Work(builder.build(), amount, y, (x, act, calls, table, routing, scratch))

    def recurrent(self, case: Case, matrices: Matrices) -> _Work:
        """In decode, each token has the next state; in prefill, each call."""
        tokens, heads, wide = case.tokens, case.rows // case.k, case.k
        spec = KernelSpec.of(
            case.op, self.isa.name, heads=heads, key_heads=heads, key_dim=wide, value_dim=wide,
            channels=0, delta=1,
        )  # fmt: skip
        random = np.random.default_rng(0)
        q, k, v = random.standard_normal((3, tokens, case.rows), np.float32) / wide**0.5
        rows = {"q": q, "k": k, "v": v, "y": np.zeros_like(q)}
        rows |= {"decay": np.full((tokens, heads), 0.9, np.float32)}
        rows |= {"beta": np.full((tokens, heads), 0.5, np.float32)}
        common: dict[str, int | float] = {"state": matrices.address, "tokens": tokens, "scale": 1.0}
        common |= {name: each.ctypes.data for name, each in rows.items()}
        common |= {f"{name}_stride": each.shape[1] for name, each in rows.items()}
        kept: tuple[object, ...] = (*rows.values(),)
        if case.kind.many:
            slots = np.arange(matrices.count, dtype=np.int32)[:, None]
            slots = slots[: max(2, int(_PASS_FLOPS / case.flops))]
            amount = len(slots) * case.flops
            scratch = Block(self.pool.workers * linear_scratch_bytes(spec), "scratch")
            common["scratch"] = scratch.address
            kept = (*kept, scratch)
        else:
            every = np.arange(-(-matrices.count // tokens) * tokens, dtype=np.int32)
            slots = (every % matrices.count).reshape(-1, tokens)
            amount = sum(len(np.unique(each)) for each in slots) * matrices.set_bytes
        builder = ProgramBuilder()
        for each in slots:
            args = pack(case.op, sequence=each.ctypes.data, **common)
            builder.add(self._jit.get(spec), args, tag=0, writes=("y",))
        return _Work(builder.build(), amount, rows["y"], (*kept, slots))

    def _spec(
        self, case: Case, op: str, sizes: Mapping[str, int], out: str = "f32", expr: str = ""
    ) -> KernelSpec:
        params = tuple(sorted({**sizes, **case.matrices[0].params}.items()))
        return KernelSpec(op, self.isa.name, case.format, out, params, expr=expr)


@dataclass(frozen=True)
class _Work:
    """A program, the bytes or FLOPs of one run, what it computes, and what its records point at."""

    program: Program
    amount: int
    result: npt.NDArray[np.float32]
    kept: tuple[object, ...]


def _drawn(experts: int, case: Case) -> dict[str, npt.NDArray[np.int32]]:
    """The (token, slot) pairs of all tokens, sorted by the experts drawn for them."""
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(experts)[: case.top_k] for _ in range(case.tokens)])
    offsets = np.zeros(experts + 1, np.int32)
    np.cumsum(np.bincount(ids.reshape(-1), minlength=experts), out=offsets[1:])
    slots = np.argsort(ids.reshape(-1), kind="stable").astype(np.int32)
    return {"slots": slots, "offsets": offsets}


def _activations(tokens: int, k: int) -> npt.NDArray[np.uint16]:
    """bf16 [tokens, k], standard normal."""
    values = np.random.default_rng(0).standard_normal((tokens, k), np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)
