"""What a plan is of, in words: the facts that `hmc show` and the page begin with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from hmc.codegen.native import arithmetic
from hmc.plan import Plan
from hmc.report.words import count, si


def facts(plan: Plan) -> list[tuple[str, str]]:
    """(what, text) of a plan's model, machine and limits."""
    model, machine, limits = plan.model, plan.machine, plan.limits
    gpus = Counter(f"{gpu.name} ({si(gpu.memory_bytes, 'B')})" for gpu in machine.gpus)
    devices = ", ".join(f"{n} x {gpu}" if n > 1 else gpu for gpu, n in gpus.items())
    formats: Counter[str] = Counter()
    for weight in plan.weights:
        formats[weight.format] += weight.bytes
    for part in plan.experts:
        formats[part.format] += part.bytes * part.count
    shards = (
        f"{len(plan.checkpoint.shards)} shard(s)"
        if plan.checkpoint.shards
        else "no shards: dummy weights"
    )
    return [
        (
            "Model",
            f"{model.architecture} ({model.family}), {model.layers} layers, hidden {model.hidden},"
            f" vocabulary {model.vocab}",
        ),
        ("Experts", f"{model.experts} a layer, {model.top_k} a token" if model.experts else "none"),
        (
            "Parameters",
            f"{count(model.parameters)}, {count(model.active_parameters)} active a token",
        ),
        ("Checkpoint", f"{plan.checkpoint.path}, {shards}"),
        ("Formats", ", ".join(f"{form} {si(b, 'B')}" for form, b in formats.most_common() if b)),
        ("Numerics", _numerics(plan)),
        ("Machine", f"{machine.name}: {machine.cpu}"),
        (
            "CPU",
            f"{machine.cores} cores, {len(machine.nodes)} NUMA node(s),"
            f" {si(machine.memory_bytes, 'B')}; {plan.isa} kernels, {plan.threads} threads",
        ),
        ("GPU", devices or "none"),
        (
            "Limits",
            f"context {limits.max_context} of {model.context}, chunks of {limits.max_chunk},"
            f" decode batch {limits.max_batch}",
        ),
        ("Switch-over", "; ".join(_switches(plan)) or "none: one way to prefill, one to decode"),
        ("Made by", f"hmc {plan.hmc_version}, plan schema {plan.schema_version}"),
    ]


def _switches(plan: Plan) -> Iterator[str]:
    """`prefill.host, prefill.stream from 3264 prompt tokens on`, one for each kind."""
    for kind, unit in (("prefill", "prompt tokens"), ("decode", "sequences")):
        mine = sorted((s for s in plan.switches if s.kind == kind), key=lambda s: s.tokens)
        parts = [f"{s.phase} from {s.tokens} {unit} on" if s.tokens > 1 else s.phase for s in mine]
        if parts:
            yield ", ".join(parts)


def _numerics(plan: Plan) -> str:
    """How a plan multiplies."""
    read = {(kernel.isa, kernel.weight) for kernel in plan.kernels.values() if kernel.weight}
    ways = {weight: arithmetic(isa, weight) for isa, weight in read}
    whole = sorted(weight for weight, way in ways.items() if way == "whole")
    how = f"; {', '.join(whole)} x 16-bit activations in whole numbers" if whole else ""
    return f"exact: stored weights{how}, bf16 x f32 sums"
