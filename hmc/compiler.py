"""From a checkpoint to a plan: config and headers -> model on meta tensors -> torch.fx
graph -> graph passes -> plan for the CPU -> plan passes -> plan.

Reads no weight and needs neither the machine the plan is for nor its GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Literal

import torch.fx

from hmc import env, models
from hmc.checkpoint import Checkpoint
from hmc.checkpoint.gguf import open_gguf
from hmc.checkpoint.location import is_gguf
from hmc.codegen.isa import best_isa
from hmc.errors import UsageError
from hmc.graph import WeightSpec, meta
from hmc.machine.detect import load_machine
from hmc.machine.model import Machine
from hmc.models import Aside
from hmc.passes import GRAPH, PLAN
from hmc.passes.emit.emit import emit
from hmc.passes.graph.trace import trace
from hmc.passes.manager import configured, run_graph, run_plan
from hmc.passes.place.budget import capacity
from hmc.passes.place.needs import needs_of
from hmc.passes.records import Base, Target
from hmc.plan import Decision, Plan
from hmc.plan.options import SNAPSHOT_GB, Options
from hmc.plan.routing_profile import load_profile
from hmc.predict.goals import parse_goals, require_goals


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
    cache_tokens: int = 0,
    snapshot_memory: float = SNAPSHOT_GB,
    slo: str = "",
    routing_profile: str | Path = "",
    ring: int = 0,
    family: str = "",
    attention: Literal["triton", "flashinfer"] = "triton",
    lm_head: Literal["auto", "stored", "screened"] = "auto",
) -> Plan:
    """Compile the model directory or GGUF file `path` into a plan.

    `machine` is "auto", a named machine, a machine file or a `Machine`; `max_context` tokens of one
    sequence (0: what fits); `dummy_weights` needs config.json alone and makes a plan to be run with
    random weights; `layers` cuts the depth of such a plan (0: all); `family` reads the model as one
    of that family (see `hmc models`), whatever config.json calls it; `threads` native workers (0:
    one a core). At least `concurrency` sequences decode at a time, and the cache holds as many of
    whole length, and more where memory is free; or `cache_tokens` tokens of all of them. Where
    layers keep states a sequence, or windows in rings, `snapshot_memory` GB may hold those of
    prompts for others that begin alike. With GPUs,
    `vram` GB of each may be used (0: all), `routing_profile` names recorded routing, and `ring`
    experts (at least 2; 0: as many as pay) fit into the slots of a streamed prefill; `attention` of
    decode is computed there by hmc's own kernels or by FlashInfer's. `lm_head` is read as stored in
    each decode step, or screened by a compact copy where the best logits will do. `slo` are goals
    such as "ttft=30s@32k,tps=20": where the prediction misses one, `CapacityError` says what binds
    and what would lift it. Raises subclasses of `HmcError`.
    """
    if max_context < 0 or layers < 0 or threads < 0 or max_chunk < 1:
        raise UsageError(
            "max_context, layers and threads must not be negative, max_chunk not below 1"
        )
    if vram < 0 or cache_tokens < 0 or concurrency < 1:
        raise UsageError("vram and cache_tokens must not be negative, concurrency not below 1")
    if not 0 <= snapshot_memory < inf:
        raise UsageError(f"snapshot_memory={snapshot_memory}: some GB, or 0 for no snapshots")
    if ring < 0 or ring == 1:
        raise UsageError(f"ring={ring}: 2 experts at least, one computed while one is loaded")
    if layers and not dummy_weights:
        raise UsageError("--layers cuts the depth of a model with dummy weights only")
    goals = parse_goals(slo, concurrency)
    options = Options(
        max_context=max_context or (goals.ttft_prompt if goals.ttft_prompt > 32_768 else 0),
        max_chunk=max_chunk,
        threads=threads,
        dummy_weights=dummy_weights,
        layers=layers,
        vram=int(vram * 1e9),
        concurrency=concurrency,
        cache_tokens=cache_tokens,
        snapshot_bytes=int(snapshot_memory * 1e9),
        ring=ring,
        attention=attention,
        lm_head=lm_head,
        slo=slo,
        family=family,
        profile=load_profile(routing_profile) if str(routing_profile) else None,
    )
    target = machine if isinstance(machine, Machine) else load_machine(machine)
    with env.uncollected():
        base = begin(open_checkpoint(path, options), target, options)
        plan = run_plan(configured(PLAN, options), base)
    require_goals(plan)
    return plan


def open_checkpoint(path: str | Path, options: Options) -> Checkpoint:
    """The checkpoint at `path`, or its config alone, as far as the options want of it."""
    if not options.dummy_weights:
        return open_gguf(Path(path)) if is_gguf(Path(path)) else Checkpoint.open(path)
    if is_gguf(Path(path)):
        raise UsageError(f"{path}: dummy weights are made from a config.json: pass one")
    checkpoint = Checkpoint.from_config(path)
    return _cut(checkpoint, options.layers) if options.layers else checkpoint


def begin(checkpoint: Checkpoint, machine: Machine, options: Options) -> Base:
    """The plan for the CPU alone, from which the plan passes start."""
    model = models.load(checkpoint.config, options.family, options.max_context, checkpoint.tensors)
    graph = trace(model.module)
    target = Target(
        checkpoint=checkpoint,
        info=model.info,
        machine=machine,
        isa=best_isa(frozenset(machine.flags)).name,
    )
    noted = (*_noted(target, graph, model.aside), *_longer(model))
    if options.profile is not None:
        options.profile.check(
            {
                meta(node).layer: weight.experts
                for node in graph.graph.nodes
                for weight in meta(node).weights
                if weight.experts
            }
        )
    lowered = run_graph(configured(GRAPH, options), graph, target)
    lowered = replace(lowered, decisions=(*noted, *lowered.decisions))
    needs = needs_of(lowered, options)
    room = capacity(needs, target, options)
    plan = emit(lowered, room, options, parse_goals(options.slo, options.concurrency))
    return Base(plan, needs, room.budget)


def _cut(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The same model with its first `layers` layers alone."""
    config = checkpoint.config
    depth = config.text.depth
    if layers > depth:
        raise UsageError(f"--layers {layers}: the model has {depth}")
    return replace(checkpoint, config=config.with_text(num_hidden_layers=layers))


def _noted(
    target: Target, graph: torch.fx.GraphModule, aside: tuple[Aside, ...]
) -> tuple[Decision, ...]:
    """What the checkpoint asks for and holds beside weights, and what became of it. Every weight of
    the model is in it, and nothing else that the family or the quantisation does not explain.
    """
    checkpoint = target.checkpoint
    notes = checkpoint.quantization.notes
    if not checkpoint.dummy:
        specs = [weight for node in graph.graph.nodes for weight in meta(node).weights]
        checkpoint.require_present(name for weight in specs for name in _names(weight))
        sources = (source for weight in specs for source in target.source(weight))
        used = (name for each in sources for name in each.tensor_names)
        notes += checkpoint.check_unused(used, {each.pattern: each.reason for each in aside})
    return tuple(Decision(by="checkpoint", **note._asdict()) for note in notes)


def _longer(model: models.Model) -> tuple[Decision, ...]:
    """That the context asked for makes another model, where it does."""
    if (limit := model.beyond) is None:
        return ()
    choice = f"that of contexts beyond {limit.tokens} tokens"
    return (Decision(by="models", subject="positions", choice=choice, reason=limit.beyond),)


def _names(weight: WeightSpec) -> Iterator[str]:
    return (weight.name.replace("{e}", str(expert)) for expert in range(max(1, weight.experts)))
