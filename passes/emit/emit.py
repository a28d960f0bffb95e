"""Turns the lowered graph into a plan: steps over named buffers, laid out in one activation arena a
phase.

Contract
    * requires "ledger"; establishes "plan"
    * knows node kinds and nothing of families: the steps follow the graph's order
    * rotary works in place, so its input must have no other reader; items are columns of their
      producer's buffer
    * the rows whose logits are wanted are gathered before the last norm

Method
    1. walk the nodes, emit one step a node (two for the gather before the last norm), note first
      and last use of
       every buffer
    2. give buffers offsets: largest first, each at the lowest offset free during its life
    3. with a GPU budget, move the dense part to gpu0 and add the copies (`hybrid.py`)
    4. columns of expert weights, run-length and difference coded
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import ClassVar

import torch.fx

from hmc.codegen.spec import MAX_TOKENS
from hmc.errors import PassFailedError
from hmc.graph import meta
from hmc.passes.context import Context
from hmc.passes.emit.hybrid import hybrid_phase
from hmc.passes.emit.steps import PhaseBuilder
from hmc.plan import (
    CheckpointInfo,
    ExpertWeights,
    Kernel,
    Plan,
    ShardInfo,
    Weight,
)
from hmc.plan.phases import DECODE, PREFILL
from hmc.version import VERSION


@dataclass(frozen=True)
class Emit:
    """Fills `context.plan`."""

    name: ClassVar[str] = "emit"
    requires: ClassVar[frozenset[str]] = frozenset({"ledger"})
    establishes: ClassVar[frozenset[str]] = frozenset({"plan"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        limits, kv = context.limits, context.kv
        assert limits is not None and kv is not None
        constants: dict[str, tuple[float, ...]] = {}
        phases = []
        step = min(limits.max_batch, MAX_TOKENS)  # more sequences take several steps
        for name, tokens in ((PREFILL, limits.max_chunk), (DECODE, step)):
            phase = PhaseBuilder(name, context, constants).build(graph, tokens)
            context.bases[name] = phase
            if context.budget is not None:
                phase = hybrid_phase(phase, {each.layer: each for each in context.placement})
            phases.append(phase)
        context.plan = Plan(
            hmc_version=VERSION,
            model=context.info,
            checkpoint=_checkpoint(context),
            machine=context.machine,
            isa=context.isa,
            threads=context.options.threads or context.machine.cores,
            limits=limits,
            weights=_weights(graph, context),
            experts=_experts(graph, context),
            constants=constants,
            placement=context.placement,
            kv=kv,
            kernels={
                key: Kernel(
                    op=spec.op,
                    isa=spec.isa,
                    weight=spec.weight,
                    out=spec.out,
                    params=spec.params,
                    tile=spec.tile,
                )
                for key, spec in sorted(context.kernels.items())
            },
            phases=tuple(phases),
            ledger=(),
            decisions=tuple(context.decisions),
        )


def _checkpoint(context: Context) -> CheckpointInfo:
    found = context.checkpoint
    return CheckpointInfo(
        path=str(found.directory),
        config_sha256=found.config.sha256,
        shards=tuple(
            ShardInfo(
                name=shard.name,
                size=shard.size,
                header_bytes=shard.header_bytes,
                header_sha256=shard.header_sha256,
            )
            for shard in found.shards
        ),
    )


def _weights(graph: torch.fx.GraphModule, context: Context) -> tuple[Weight, ...]:
    found: dict[str, Weight] = {}
    for node in graph.graph.nodes:
        for weight in meta(node).weights:
            if weight.experts or weight.name in found:
                continue
            (source,) = context.source(weight)
            found[weight.name] = Weight(
                name=weight.name,
                format=source.format,
                shape=source.shape,
                shard=source.data.shard,
                offset=source.data.offset,
                bytes=source.data.nbytes,
                group=source.block,
                scale_dtype=source.scale_dtype,
                scale_shard=source.scale.shard if source.scale else -1,
                scale_offset=source.scale.offset if source.scale else 0,
                scale_bytes=source.scale.nbytes if source.scale else 0,
            )
    return tuple(found.values())


def _experts(graph: torch.fx.GraphModule, context: Context) -> tuple[ExpertWeights, ...]:
    result = []
    for node in graph.graph.nodes:
        found = meta(node)
        for weight in found.weights:
            if not weight.experts:
                continue
            sources = context.source(weight)
            first = sources[0]
            scales = [source.scale for source in sources if source.scale is not None]
            if len({(s.format, s.block, s.scale_dtype) for s in sources}) != 1:
                raise PassFailedError(f"{weight.name}: the experts of one layer differ in format")
            result.append(
                ExpertWeights(
                    layer=found.layer,
                    role=weight.role,  # type: ignore[arg-type]
                    pattern=weight.name,
                    format=first.format,
                    shape=first.shape,
                    bytes=first.data.nbytes,
                    count=len(sources),
                    shards=_runs([source.data.shard for source in sources]),
                    offsets=_differences([source.data.offset for source in sources]),
                    group=first.block,
                    scale_dtype=first.scale_dtype,
                    scale_bytes=first.scale.nbytes if first.scale else 0,
                    scale_shards=_runs([scale.shard for scale in scales]),
                    scale_offsets=_differences([scale.offset for scale in scales]),
                )
            )
    return tuple(result)


def _runs(values: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple((len(list(group)), value) for value, group in groupby(values))


def _differences(values: list[int]) -> tuple[int, ...]:
    return (*values[:1], *(after - before for before, after in pairwise(values)))
