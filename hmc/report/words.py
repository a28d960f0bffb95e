"""Numbers as people read them; and what a plan is of, in words: the facts that `hmc show` and the
page begin with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from hmc.codegen.native import of_few
from hmc.plan import KVLayout, Plan

_LARGE = ("", "k", "M", "G", "T", "P")
_SMALL = ("", "m", "µ", "n", "p")
_DIGITS = 3


@dataclass(frozen=True)
class Tick:
    """A label at one coordinate of an axis."""

    at: float
    text: str


def si(value: float, unit: str) -> str:
    """`value` with an SI prefix: 1.5 GB, 46.1 ms, 820 GFLOP/s."""
    if value == 0:
        return f"0 {unit}"
    scaled, index = value, 0
    while abs(scaled) >= 999.5 and index < len(_LARGE) - 1:
        scaled, index = scaled / 1000, index + 1
    if index or abs(scaled) >= 1 or unit in ("B", "FLOP", "tokens"):
        return f"{number(scaled)} {_LARGE[index]}{unit}"
    while abs(scaled) < 1 and index < len(_SMALL) - 1:
        scaled, index = scaled * 1000, index + 1
    return f"{number(scaled)} {_SMALL[index]}{unit}"


def count(number: float) -> str:
    """A count in the unit that reads best: 671.03 B, 7.66 M."""
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"


def number(value: float) -> str:
    """A number of three digits, whole where it is larger, with thin spaces between thousands."""
    whole = len(str(int(abs(value))))
    places = max(0, _DIGITS - whole) if abs(value) >= 1 else _DIGITS
    text = f"{value:,.{places}f}".replace(",", " ")
    return text.rstrip("0").rstrip(".") if "." in text else text


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
        *([("Hub id", plan.checkpoint.hub)] if plan.checkpoint.hub else []),
        *([("Lossy", plan.checkpoint.lossy)] if plan.checkpoint.lossy else []),
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
            f" decode batch {limits.max_batch}, cache of {plan.kv.capacity_tokens} tokens",
        ),
        *([("Sequences", _sequences(plan.kv))] if plan.kv.bytes_per_sequence else []),
        ("Switch-over", "; ".join(_switches(plan)) or "none: one way to prefill, one to decode"),
        ("Made by", f"hmc {plan.hmc_version}, plan schema {plan.schema_version}"),
    ]


def _sequences(kv: KVLayout) -> str:
    """What a cache keeps of sequences beside what grows with their tokens."""
    kept = "no snapshots: no prompt is reused"
    if kv.snapshots:
        kept = f"{kv.snapshots} snapshots of {si(kv.bytes_per_snapshot, 'B')} for prompts alike"
    each, token = si(kv.bytes_per_sequence, "B"), si(kv.bytes_per_token, "B")
    return f"{each} each, and {token} a token; {kept}"


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
    ways = {weight: of_few(isa, weight) for isa, weight in read}
    whole = sorted(weight for weight, way in ways.items() if way == "whole")
    how = f"; {', '.join(whole)} x 16-bit activations in whole numbers" if whole else ""
    return f"exact: stored weights{how}, bf16 x f32 sums"
