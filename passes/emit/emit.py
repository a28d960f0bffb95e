"""Turns the lowered graph into a plan for the CPU alone: steps over named buffers, laid out in one
activation arena a phase.

Contract
    * the plan is whole and keeps the rules; what other devices do is up to the passes over it
    * knows node kinds and nothing of families: the steps follow the graph's order
    * rotary works in place, so its input must have no other reader; items are columns of their
      producer's buffer
    * the rows whose logits are wanted are gathered before the last norm

Method
    1. walk the nodes, emit one step a node (two for the gather before the last norm), note first
       and last use of every buffer
    2. give buffers offsets: largest first, each at the lowest offset free during its life
    3. columns of expert weights, run-length and difference coded
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby, pairwise
from typing import Any

import torch.fx

from hmc.checkpoint import LOSSY_KEY, Part
from hmc.checkpoint.views import Pick
from hmc.codegen.spec import MAX_TOKENS, KernelSpec
from hmc.errors import PassFailedError
from hmc.formats import format_of
from hmc.graph import meta
from hmc.passes.emit.steps import PhaseBuilder
from hmc.passes.records import Capacity, Lowered, Target
from hmc.plan import (
    CheckpointInfo,
    ExpertPlane,
    ExpertWeights,
    Goals,
    LayerPlacement,
    Plan,
    StoredPart,
    StoredPick,
    StoredPlane,
    Weight,
)
from hmc.plan.options import Options
from hmc.plan.phases import DECODE, PREFILL
from hmc.ranges import ranges
from hmc.version import VERSION


def emit(lowered: Lowered, capacity: Capacity, options: Options, goals: Goals) -> Plan:
    """The plan of a lowered graph, everything on the host, and without a ledger.

    Raises `PassFailedError` on a graph that cannot be emitted.
    """
    graph, target, limits = lowered.graph, lowered.target, capacity.limits
    constants: dict[tuple[float, ...], str] = {}
    kernels: dict[str, KernelSpec] = {}
    most = min(limits.max_batch, MAX_TOKENS)  # more sequences take several steps
    phases = tuple(
        PhaseBuilder(name, target, constants, kernels).build(graph, calls)
        for name, calls in ((PREFILL, limits.max_chunk), (DECODE, most))
    )
    weights, experts = _weights(graph, target)
    return Plan(
        hmc_version=VERSION,
        model=target.info,
        checkpoint=CheckpointInfo(
            path=str(target.checkpoint.location),
            config_sha256=target.checkpoint.config.sha256,
            shards=target.checkpoint.shards,
            lossy=target.checkpoint.config.get_str(LOSSY_KEY, ""),
        ),
        machine=target.machine,
        isa=target.isa,
        threads=options.threads or target.machine.cores,
        options=options,
        limits=limits,
        weights=weights,
        experts=experts,
        constants={name: values for values, name in constants.items()},
        placement=tuple(
            LayerPlacement(layer=layer, tiers={"host": ranges(range(count))})
            for layer, count in {each.layer: each.count for each in experts}.items()
        ),
        kv=capacity.kv,
        kernels=dict(sorted(kernels.items())),
        phases=phases,
        ledger=(),
        decisions=(*lowered.decisions, *capacity.decisions),
        goals=goals,
    )


def _weights(
    graph: torch.fx.GraphModule, target: Target
) -> tuple[tuple[Weight, ...], tuple[ExpertWeights, ...]]:
    """Every weight that a node reads once, and the columns of routed experts."""
    weights: dict[str, Weight] = {}
    experts: list[ExpertWeights] = []
    for found in map(meta, graph.graph.nodes):
        for spec in found.weights:
            if spec.key in weights:
                continue
            sources = target.source(spec)
            first = sources[0]
            stored: dict[str, Any] = {
                "format": first.format,
                "shape": first.shape,
                "group": first.group,
            }
            planes = list(zip(format_of(first.format).planes, first.tensors, strict=True))
            picks = first.picks or (None,) * len(planes)
            if not spec.experts:
                places = tuple(
                    StoredPlane(
                        name=plane.name,
                        dtype=tensor.dtype,
                        shard=tensor.shard,
                        offset=tensor.offset,
                        bytes=tensor.nbytes,
                        parts=tuple(map(_part, first.parts)),
                        pick=_pick(pick),
                    )
                    for (plane, tensor), pick in zip(planes, picks, strict=True)
                )
                weights[spec.key] = Weight(name=spec.key, planes=places, **stored)
                continue
            if len({(s.format, s.group, s.dtypes, s.picks) for s in sources}) != 1:
                raise PassFailedError(f"{spec.name}: the experts of one layer differ in format")
            columns = tuple(
                ExpertPlane(
                    name=plane.name,
                    dtype=tensor.dtype,
                    bytes=tensor.nbytes,
                    shards=_runs([source.tensors[at].shard for source in sources]),
                    offsets=_differences([source.tensors[at].offset for source in sources]),
                    pick=_pick(picks[at]),
                )
                for at, (plane, tensor) in enumerate(planes)
            )
            experts.append(
                ExpertWeights(
                    layer=found.layer,
                    role=spec.role,  # type: ignore[arg-type]
                    pattern=spec.key,
                    count=len(sources),
                    planes=columns,
                    **stored,
                )
            )
    return tuple(weights.values()), tuple(experts)


def _pick(pick: Pick | None) -> StoredPick | None:
    return None if pick is None else StoredPick(**asdict(pick))


def _part(part: Part) -> StoredPart:
    tensor = part.tensor
    return StoredPart(
        dtype=tensor.dtype,
        shard=tensor.shard,
        offset=tensor.offset,
        bytes=tensor.nbytes,
        rows=part.rows,
        transposed=part.transposed,
    )


def _runs(values: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple((len(list(group)), value) for value, group in groupby(values))


def _differences(values: list[int]) -> tuple[int, ...]:
    return (*values[:1], *(after - before for before, after in pairwise(values)))
