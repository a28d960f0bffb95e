"""From a checkpoint directory to a plan: config and headers -> model on meta tensors -> torch.fx
graph -> passes -> plan.

Reads no weight and needs neither the machine the plan is for nor its GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch.fx

from hmc import env, models
from hmc.checkpoint import Checkpoint
from hmc.codegen.isa import best_isa
from hmc.errors import UsageError
from hmc.graph import WeightSpec, meta
from hmc.machine import Machine
from hmc.machine.detect import load_machine
from hmc.passes import PIPELINE, Context, Options, run_pipeline
from hmc.passes.graph.trace import trace
from hmc.passes.place.nodes import routed_nodes
from hmc.passes.routing_profile import RoutingProfile, load_profile
from hmc.plan import ModelInfo, Plan
from hmc.predict.feasible import require_goals
from hmc.predict.goals import parse_goals


def compile(
    path: str | Path,
    *,
    machine: str | Machine = "auto",
    max_context: int = 0,
    dummy_weights: bool = False,
    layers: int = 0,
    threads: int = 0,
    max_chunk: int = 512,
    vram: float = 0.0,
    concurrency: int = 1,
    slo: str = "",
    routing_profile: str | Path = "",
    ring: int = 0,
) -> Plan:
    """Compile the model directory `path` into a plan.

    `machine` is "auto", a named machine, a machine file or a `Machine`; `max_context` tokens of one
    sequence (0: what fits); `dummy_weights` needs config.json alone and makes a plan to be run with
    random weights; `layers` cuts the depth of such a plan (0: all); `threads` native workers (0:
    one a core). With GPUs, `vram` GB of each may be used (0: all), the cache holds `concurrency`
    sequences, `routing_profile` names recorded routing, and `ring` experts (at least 2; 0: as many
    as pay) fit into the slots of a streamed prefill. `slo` are goals such as
    "ttft=30s@32k,tps=20": where the prediction misses one, `CapacityError` says what binds and what
    would lift it. Raises subclasses of `HmcError`.
    """
    if max_context < 0 or layers < 0 or threads < 0 or max_chunk < 1:
        raise UsageError(
            "max_context, layers and threads must not be negative, max_chunk not below 1"
        )
    if vram < 0 or concurrency < 1:
        raise UsageError("vram must not be negative, concurrency not below 1")
    if ring < 0 or ring == 1:
        raise UsageError(f"ring={ring}: 2 experts at least, one computed while one is loaded")
    goals = parse_goals(slo, concurrency)
    if layers and not dummy_weights:
        raise UsageError("--layers cuts the depth of a model with dummy weights only")
    checkpoint = Checkpoint.from_config(path) if dummy_weights else Checkpoint.open(path)
    if layers:
        checkpoint = _cut(checkpoint, layers)
    model = models.load(checkpoint.config)
    graph = trace(model.module)
    _check_tensors(checkpoint, graph, model.tolerated)
    target = machine if isinstance(machine, Machine) else load_machine(machine)
    context = Context(
        checkpoint=checkpoint,
        info=_model_info(model.info, checkpoint),
        machine=target,
        isa=best_isa(frozenset(target.flags)).name,
        options=Options(
            max_context=max_context or (goals.ttft_prompt if goals.ttft_prompt > 32_768 else 0),
            max_chunk=max_chunk,
            max_batch=max(Options.max_batch, concurrency),
            threads=threads,
            vram=int(vram * 1e9),
            concurrency=concurrency,
            ring=ring,
            profile=_profile(routing_profile, graph),
        ),
    )
    with env.uncollected():
        run_pipeline(PIPELINE, graph, context)
    assert context.plan is not None
    plan = context.plan.model_copy(update={"goals": goals})
    require_goals(plan)
    return plan


def _profile(path: str | Path, graph: torch.fx.GraphModule) -> RoutingProfile | None:
    if not str(path):
        return None
    routed = {found.layer: found.attr("experts") for found in routed_nodes(graph)}
    return load_profile(path, routed)


def _cut(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The same model with its first `layers` layers alone."""
    depth = checkpoint.config.require_int("num_hidden_layers")
    if layers > depth:
        raise UsageError(f"--layers {layers}: the model has {depth}")
    values = {**checkpoint.config.values, "num_hidden_layers": layers}
    return replace(checkpoint, config=replace(checkpoint.config, values=values))


def _model_info(info: models.ModelInfo, checkpoint: Checkpoint) -> ModelInfo:
    names = checkpoint.config.get_strs("architectures")
    return ModelInfo(
        family=info.family,
        architecture=names[0] if names else info.family,
        hidden=info.hidden,
        layers=info.layers,
        vocab=info.vocab,
        experts=info.experts,
        top_k=info.top_k,
        context=info.context,
        parameters=info.parameters,
        active_parameters=info.active_parameters,
        eos_token_ids=info.eos_token_ids,
    )


def _check_tensors(
    checkpoint: Checkpoint, graph: torch.fx.GraphModule, tolerated: tuple[str, ...]
) -> None:
    """Every weight of the model is in the checkpoint, and nothing else is, but what the family
    tolerates.
    """
    if checkpoint.dummy:
        return
    specs = [weight for node in graph.graph.nodes for weight in meta(node).weights]
    checkpoint.require_present(name for weight in specs for name in _names(weight))
    used = [
        name
        for weight in specs
        for each in _names(weight)
        for name in checkpoint.resolve(each, weight.shape, linear=weight.linear).tensor_names
    ]
    checkpoint.check_unused(used, tolerated)


def _names(weight: WeightSpec) -> Iterator[str]:
    if not weight.experts:
        yield weight.name
        return
    before, _, after = weight.name.partition("{e}")
    for expert in range(weight.experts):
        yield f"{before}{expert}{after}"
