"""`hmc show`: a plan as tables, one layer, one expert, the steps, or a kernel's IR and assembly."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, islice

import click

from hmc.cli.output import JSON, console, print_json, records, size, table
from hmc.cli.planned import PLAN, planned
from hmc.errors import UsageError
from hmc.ops import State
from hmc.plan import Operand, Phase, Plan
from hmc.plan.stored import expand_runs
from hmc.ranges import expert_ranges, ranges
from hmc.report.words import facts


@click.command("show")
@PLAN
@click.option("--layer", type=int, help="One layer: its weights, placement and steps.")
@click.option("--expert", type=int, help="With --layer: where one routed expert is, and why.")
@click.option("--graph", is_flag=True, help="The steps of every phase, one a line.")
@click.option("--ir", metavar="KERNEL", help="LLVM IR of a kernel (names: see the kernel table).")
@click.option("--asm", metavar="KERNEL", help="Assembly of a kernel.")
@JSON
def command(
    plan_path: str,
    layer: int | None,
    expert: int | None,
    graph: bool,
    ir: str | None,
    asm: str | None,
    as_json: bool,
) -> None:
    """Show a plan, or that of a model, compiled for this machine: model, machine, memory,
    placement, kernels, phases, and each decision with its reason.
    """
    plan = planned(plan_path, fetch=False).plan
    if expert is not None and layer is None:
        raise UsageError("--expert needs --layer")
    if ir is not None or asm is not None:
        text = _kernel_text(plan, ir or asm or "", assembly=ir is None)
        print_json({"kernel": ir or asm, "text": text}) if as_json else click.echo(text)
    elif layer is not None and expert is not None:
        _show_expert(plan, layer, expert, as_json)
    elif layer is not None:
        _show_layer(plan, layer, as_json)
    elif as_json:
        print_json(plan.model_dump(mode="json"))
    elif graph:
        for phase in plan.phases:
            click.echo(f"{phase.name}: {len(phase.steps)} steps")
            for line in _step_lines(phase):
                click.echo(f"  {line}")
    else:
        _show_plan(plan)


def _show_plan(plan: Plan) -> None:
    out = console()
    out.print(table("Plan", ("", ""), facts(plan)))
    rows = [(i.device, i.kind, size(i.bytes), i.detail) for i in plan.ledger]
    for device, total in plan.ledger_totals.items():
        room = plan.machine.memory_of(device)
        verdict = "fits" if total <= room else "TOO LARGE for"
        rows.append((device, "total", size(total), f"{verdict} {size(room)} of memory"))
    out.print(table("Memory", ("device", "kind", "bytes", "detail"), rows, numbers=("bytes",)))
    states = [
        (ranges(group.layers), s.name, f"{s.width} {s.dtype}", f"a {s.per}", _seen(s))
        for group in plan.kv.groups
        for s in group.states
    ]
    out.print(table("States", ("layers", "state", "elements", "kept", "positions"), states))
    alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for each in plan.placement:
        alike.setdefault(tuple(each.tiers.items()), []).append(each.layer)
    placed = [(ranges(layers), *tier) for tiers, layers in alike.items() for tier in tiers]
    out.print(table("Experts", ("layers", "tier", "experts"), placed))
    steps = [
        (
            number,
            phase.name,
            len(phase.steps),
            phase.max_tokens,
            size(sum(step.weight_bytes for step in phase.steps)),
            f"{sum(step.flops for step in phase.steps) / 1e9:.2f}",
        )
        for number, phase in enumerate(plan.phases, start=1)
    ]
    columns: tuple[str, ...] = (
        "",
        "phase",
        "steps",
        "tokens a call",
        "weights a token",
        "GFLOP a token",
    )
    out.print(table("Phases", columns, steps, numbers=columns[2:]))
    uses = Counter((phase.name, k) for phase in plan.phases for s in phase.steps for k in s.kernels)
    names = dict.fromkeys(key for _, key in uses)
    kernels = [(key, *(uses[phase.name, key] or "-" for phase in plan.phases)) for key in names]
    columns = ("steps by phase", *map(str, range(1, len(plan.phases) + 1)))
    out.print(table("Kernels", columns, kernels, numbers=columns[1:]))
    decisions = [(d.by, f"{d.subject}: {d.choice}", d.reason) for d in plan.decisions]
    out.print(table("Decisions", ("pass", "decision", "reason"), decisions))


def _seen(state: State) -> int | str:
    """Positions of a state that are read again."""
    return "-" if state.per == "sequence" else state.window or "all"


def _show_layer(plan: Plan, layer: int, as_json: bool) -> None:
    _check_layer(plan, layer)
    stored = {weight.name: weight for weight in plan.weights}
    weights: list[tuple[str, ...]] = [
        (step.op, role, name, stored[name].format, "x".join(map(str, stored[name].shape)))
        for step in plan.phases[-1].steps
        if step.layer == layer
        for role, name in step.weights.items()
        if name in stored
    ]
    weights += [
        ("experts", e.role, f"{e.pattern} (e < {e.count})", e.format, "x".join(map(str, e.shape)))
        for e in plan.experts
        if e.layer == layer
    ]
    tiers = next((p.tiers for p in plan.placement if p.layer == layer), {})
    lines = {phase.name: _step_lines(phase, layer) for phase in plan.phases}
    if as_json:
        listed = records(("op", "role", "name", "format", "shape"), weights)
        print_json({"layer": layer, "weights": listed, "tiers": tiers, "steps": lines})
        return
    out = console()
    out.print(table(f"Layer {layer}", ("op", "role", "weight", "format", "shape"), weights))
    if tiers:
        out.print(table("Experts", ("tier", "experts"), list(tiers.items())))
    for name, steps in lines.items():
        click.echo(f"{name}:")
        for line in steps:
            click.echo(f"  {line}")


def _show_expert(plan: Plan, layer: int, expert: int, as_json: bool) -> None:
    _check_layer(plan, layer)
    parts = [each for each in plan.experts if each.layer == layer]
    if not parts:
        raise UsageError(f"layer {layer} is dense: it has no routed experts")
    if not 0 <= expert < parts[0].count:
        raise UsageError(f"--expert {expert}: layer {layer} has experts 0 to {parts[0].count - 1}")
    total = sum(part.bytes for part in parts)
    reads = plan.model.top_k / plan.model.experts
    reason = next((d.reason for d in plan.decisions if d.by == "expert_placement"), "")
    tiers = next(each.tiers for each in plan.placement if each.layer == layer)
    tier = next(name for name, text in tiers.items() if expert in expert_ranges(text))
    tensors = []
    for part in parts:
        for plane in part.planes:
            shard = next(islice(expand_runs(plane.shards), expert, None))
            offset = next(islice(accumulate(plane.offsets), expert, None))
            name = plan.checkpoint.shards[shard].name if shard >= 0 else "dummy"
            weight = part.pattern.format(e=expert)
            tensors.append((part.role, weight, plane.name, plane.dtype, name, offset, plane.bytes))
    columns = ("role", "weight", "plane", "dtype", "shard", "offset", "bytes")
    found = {
        "layer": layer,
        "expert": expert,
        "tier": tier,
        "bytes": total,
        "reads_per_token": reads,
        "bytes_per_token": total * reads,
        "reason": reason,
    }
    if as_json:
        print_json(found | {"tensors": records(columns, tensors)})
        return
    out = console()
    click.echo(
        f"layer {layer}, expert {expert}: {size(total)} on {tier} ({reason});"
        f" read by {reads:.1%} of the tokens if routing is even"
    )
    out.print(table("", columns, tensors, numbers=("offset", "bytes")))


def _check_layer(plan: Plan, layer: int) -> None:
    if not 0 <= layer < plan.model.layers:
        raise UsageError(f"--layer {layer}: the model has layers 0 to {plan.model.layers - 1}")


def _step_lines(phase: Phase, layer: int | None = None) -> list[str]:
    """`12 linear @0 cpu: x=norm -> y=q [linear-fp8-k2048]`, one a step."""
    lines = []
    for step in phase.steps:
        if layer is not None and step.layer != layer:
            continue
        inputs = " ".join(f"{role}={_operand(o)}" for role, o in step.inputs.items())
        outputs = " ".join(f"{role}={_operand(o)}" for role, o in step.outputs.items())
        where = f" @{step.layer}" if step.layer >= 0 else ""
        lines.append(
            f"{step.id} {step.op}{where} {step.resource}: {inputs} -> {outputs}"
            f" [{', '.join(step.kernels)}]"
        )
    return lines


def _operand(operand: Operand) -> str:
    columns = f"[{operand.column}:{operand.column + operand.width}]" if operand.column else ""
    return operand.buffer + columns


def _kernel_text(plan: Plan, name: str, assembly: bool) -> str:
    from hmc.codegen.jit import Jit
    from hmc.codegen.kernels import EMITTERS

    matches = [key for key in plan.kernels if key == name] or [
        key for key in plan.kernels if key.startswith(name)
    ]
    if len(matches) != 1:
        known = ", ".join(matches or sorted(plan.kernels))
        raise UsageError(
            f"kernel {name} is {'ambiguous' if matches else 'not in the plan'}: {known}"
        )
    spec, jit = plan.kernels[matches[0]], Jit(EMITTERS)
    return jit.assembly(spec) if assembly else jit.ir_text(spec)
