"""The CPU side: streaming reads by node and threads, the kernels that plans run, barriers; hides
buffers and pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from statistics import median

import numpy as np

from hmc.bench.bandwidth import SWEEP, MemoryReference, StreamingRead, dot_peak
from hmc.bench.cases import Case, Row
from hmc.bench.kernels import KernelBench
from hmc.bench.probe.result import Effort, Measurement
from hmc.codegen.arguments import pack
from hmc.codegen.isa import Isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.spec import KernelSpec
from hmc.compiler import compile as compile_plan
from hmc.formats import format_of
from hmc.machine.model import CpuRates, GemvRate, Rate
from hmc.machine.topology import Node
from hmc.ops import OPS
from hmc.ops.attention import attended, gqa_flops
from hmc.plan import Plan
from hmc.plan.phases import PREFILL
from hmc.runtime.executor import Executor
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import ProgramBuilder
from hmc.runtime.host.trace import Recorder

_LINEAR = (2048, 7168)
_EXPERTS = ((768, 2048), (2048, 7168))
_RECORDS = 2000
_MODEL = Path(__file__).parent / "attention.json"
_HEADS, _WIDTH = 32, 128
"""Qwen3-30B-A3B's heads in a model that is otherwise small: what attention is measured with."""
_CHUNK, _CONTEXT = 512, 2048
_MEMORY_BOUND = 0.6
"""Share of the streaming read from which on a decode kernel is taken to wait for memory."""


# -- memory ----------------------------------------------------------------------------------------


def reads(node: Node, isa: Isa, effort: Effort) -> Iterator[Measurement]:
    """Streaming reads of one node's memory by 1, 2, 4, ... and all of its cores; the buffer is
    written first by those who read it, so it is the node's own.
    """
    cpus = [core[0] for core in node.cores]
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64, 128) if count < len(cpus)]
    jit = Jit(EMITTERS)
    best = None
    for count in (len(cpus), *reversed(counts)):
        with Pool(jit, isa, cpus=cpus[:count]) as pool:
            if best is None:
                ways = SWEEP[:: effort.every]
                memory = MemoryReference(pool, jit, isa, megabytes=effort.stream, variants=ways)
                reader: StreamingRead = memory
                best = memory.variant
            else:
                reader = StreamingRead(pool, jit, isa, effort.stream * 1_000_000 or None)
                reader.once(best)
            values = tuple(reader.once(best) for _ in range(effort.passes))
        name = "read" if count == len(cpus) else "read with fewer threads"
        yield Measurement(name, "B/s", values, f"node {node.id}, {count} thread(s), {best}")


def remote(nodes: Sequence[Node], isa: Isa, effort: Effort) -> Measurement:
    """Reads of all nodes together where each node's workers read what those of the next one have
    touched."""
    jit = Jit(EMITTERS)
    cpus = [[core[0] for core in node.cores] for node in nodes]
    mine, theirs = list(chain(*cpus)), list(chain(*cpus[1:], cpus[0]))
    with Pool(jit, isa, cpus=mine) as own, Pool(jit, isa, cpus=theirs) as others:
        ways = SWEEP[:: effort.every]
        memory = MemoryReference(own, jit, isa, megabytes=effort.stream, variants=ways)
        reader = StreamingRead(others, jit, isa, memory.size)
        values = tuple(reader.once_of(memory, memory.variant) for _ in range(effort.passes))
    detail = f"{len(nodes)} nodes, each the next one's memory, {memory.variant}"
    return Measurement("remote", "B/s", values, detail)


# -- matmuls ---------------------------------------------------------------------------------------


def kernels(isa: Isa, effort: Effort, formats: Sequence[str], threads: int | None) -> list[Row]:
    """Linears and experts of decode, matmuls and grouped experts of prefill, as `hmc bench kernels`
    measures them."""
    cases = [Case("linear", form, *_LINEAR, tokens) for form in formats for tokens in effort.tokens]
    cases += [Case("experts", form, *shape, 1) for form in formats for shape in _EXPERTS]
    dense = [form for form in formats if not format_of(form).grouped]
    cases += [Case("gemm", form, *_LINEAR, _CHUNK) for form in dense]
    cases += [Case("grouped", form, *_EXPERTS[0], _CHUNK) for form in formats[:1]]
    with KernelBench(isa, threads=threads) as bench:
        return bench.measure(cases, repetitions=effort.passes, megabytes=effort.weights)


def matmuls(rows: Sequence[Row]) -> Iterator[Measurement]:
    """What the rows say, in the unit of each. Memory drifts by half within minutes on shared
    machines, so each pass counts relative to the reference before and after it, times the median of
    all references: the rates of one file belong together. Decode kernels that are far from the
    memory's rate are bound by instructions, and count as they are.
    """
    memory = median(shared_reads(rows))
    peak = median(r for row in rows if row.case.kind.many for r in row.compared.references)
    prefill = []
    for row in rows:
        case, kind = row.case, row.case.kind
        detail = f"{case.format} {case.shape}, {case.tokens} token(s)"
        if kind.many:
            prefill.append(Measurement(kind.probed, "FLOP/s", _scaled(row, peak), detail))
        else:
            yield Measurement(kind.probed, "B/s", _scaled(row, memory), detail)
    yield from prefill
    yield Measurement(
        "dot", "FLOP/s", tuple(each.median for each in prefill), "prefill matmuls as above"
    )
    yield from _experts(rows, memory)


def shared_reads(rows: Sequence[Row]) -> tuple[float, ...]:
    """Streaming reads of all cores between the passes of the decode kernels, bytes/s."""
    return tuple(r for row in rows if not row.case.kind.many for r in row.compared.references)


def _scaled(row: Row, reference: float) -> tuple[float, ...]:
    """Each pass over its neighbouring references, times `reference`; of decode kernels only where
    memory binds them."""
    if not row.case.kind.many and row.compared.ratio < _MEMORY_BOUND:
        return row.compared.values
    return tuple(each * reference for each in row.compared.quotients)


def _experts(rows: Sequence[Row], memory: float) -> Iterator[Measurement]:
    """Bytes/s of routed experts by format, and the seconds of one beyond its bytes.

    A small and a large expert tell both apart: seconds = bytes / rate + rest. Where that leaves
    nothing (noise), the large one's rate stands alone.
    """
    rests = []
    for form, group in groupby(_decode(rows, routed=True), key=lambda row: row.case.format):
        found = sorted(
            (sum(shape.bytes for shape in row.case.matrices), _scaled(row, memory)) for row in group
        )
        size, rates = found[-1]
        seconds, rest = size / median(rates), 0.0
        if len(found) > 1:
            small = found[0][0]
            slope = (seconds - small / median(found[0][1])) / (size - small)
            rest = max(0.0, seconds - slope * size) if slope > 0 else 0.0
        rests.append(rest)
        share = seconds / (seconds - rest)
        detail = f"{form}, one token, {size / 1e6:.1f} MB each, without the rest"
        yield Measurement("experts", "B/s", tuple(share * rate for rate in rates), detail)
    if all(rest > 0 for rest in rests):
        yield Measurement("expert", "s", tuple(rests), "the rest: a routed expert beyond its bytes")


def _decode(rows: Sequence[Row], *, routed: bool) -> list[Row]:
    """Rows of decode kernels: of experts, or of single matrices."""
    return [row for row in rows if not row.case.kind.many and row.case.kind.routed == routed]


# -- the pool --------------------------------------------------------------------------------------


def pool_rates(isa: Isa, effort: Effort, threads: int | None) -> Iterator[Measurement]:
    """The register-only multiply-add peak, and what a record of a native program costs."""
    jit = Jit(EMITTERS)
    with Pool(jit, isa, threads) as pool:
        peaks = tuple(dot_peak(pool, jit, isa, repetitions=3) for _ in range(effort.passes))
        detail = f"between registers, {pool.workers} thread(s), {isa.name}"
        yield Measurement("multiply-add peak", "FLOP/s", peaks, detail)
        width = 64
        x = np.zeros(3 * width, np.float32)
        spec = KernelSpec.of("add", isa.name, width=width)
        at = x.ctypes.data
        arguments = {"h_stride": width, "d0_stride": width, "d1": 0, "d1_stride": 0}
        args = pack(
            "add", h=at, d0=at + 4 * width, y=at + 8 * width, y_stride=width, tokens=1, **arguments
        )
        builder = ProgramBuilder()
        for _ in range(_RECORDS):
            builder.add(jit.get(spec), args, tag=0, writes=("y",))
        program = builder.build()
        trace = np.zeros((len(program), pool.workers, 2), np.int64)
        values = []
        for _ in range(effort.passes + 1):
            pool.run(program.records, trace)
            values.append(pool.seconds(trace) / _RECORDS)
        detail = f"an almost empty record behind a barrier, {pool.workers} thread(s)"
        yield Measurement("record", "s", tuple(values[1:]), detail)


def attention(effort: Effort, threads: int | None) -> Iterator[Measurement]:
    """Attention of a prefill chunk behind a past ("attend") and of a decode step, through a plan of
    Qwen3-30B-A3B's heads, in FLOP/s of the (query, key) pairs that are used."""
    plan = compile_plan(
        _MODEL,
        max_context=_CONTEXT,
        max_chunk=_CHUNK,
        threads=threads or 0,
        dummy_weights=True,
    )
    executor = Executor(plan, None, dummy_weights=True)
    ids = np.zeros(_CONTEXT - 1, np.int32)
    chunks = -(-len(ids) // _CHUNK)
    first = len(ids) * (chunks - 1) // chunks
    prefill, decode = [], []
    try:
        for _ in range(effort.passes + 1):
            sequence = executor.open()
            parts = executor.prefill(sequence, ids)
            for _ in range(chunks - 1):
                next(parts)
            with executor.recorded() as recorder:
                next(parts)
            prefill.append(_attention_seconds(plan, PREFILL, recorder))
            with executor.recorded() as recorder:
                executor.decode([sequence], ids[:1])
            decode.append(_attention_seconds(plan, "decode", recorder))
            executor.release(sequence)
    finally:
        executor.close()
    queries = len(ids) - first
    work = gqa_flops(_HEADS, _WIDTH, _WIDTH, attended(queries, first))
    detail = f"{queries} queries behind {first} keys, {_HEADS} heads of {_WIDTH}"
    yield Measurement("attend", "FLOP/s", tuple(work / each for each in prefill[1:]), detail)
    work = gqa_flops(_HEADS, _WIDTH, _WIDTH, attended(1, len(ids)))
    detail = f"one query behind {len(ids)} keys, {_HEADS} heads of {_WIDTH}"
    values = tuple(work / each for each in decode[1:])
    yield Measurement("attention in decode", "FLOP/s", values, detail)


def _attention_seconds(plan: Plan, phase: str, recorder: Recorder) -> float:
    """Seconds in the attention step's kernels."""
    mine = {step.id for step in plan.phase(phase).steps if OPS[step.op].attends}
    return sum(seconds for step, seconds in recorder.by_step().items() if step in mine)


# -- the machine -----------------------------------------------------------------------------------


def cpu_rates(found: Sequence[Measurement], rows: Sequence[Row]) -> CpuRates:
    by_name: dict[str, list[Measurement]] = {}
    for each in found:
        by_name.setdefault(each.what, []).append(each)
    linear = [row.case for row in _decode(rows, routed=False)]
    formats = dict.fromkeys(row.case.format for row in _decode(rows, routed=True))

    def optional(name: str) -> Rate | None:
        return by_name[name][0].rate() if name in by_name else None

    return CpuRates(
        read=tuple(each.rate() for each in by_name["read"]),
        gemv=tuple(
            GemvRate(format=case.format, tokens=case.tokens, rate=each.rate())
            for case, each in zip(linear, by_name["gemv"], strict=True)
        ),
        dot=by_name["dot"][0].rate(),
        attend=by_name["attend"][0].rate(),
        record=by_name["record"][0].rate(),
        experts=tuple(
            GemvRate(format=form, tokens=1, rate=each.rate())
            for form, each in zip(formats, by_name["experts"], strict=True)
        ),
        expert=optional("expert"),
        remote=optional("remote"),
        link=optional("link"),
        link_latency=optional("link_latency"),
    )
