"""Runs passes: verifies, times, dumps and diffs after each, lints and recompiles where one changed
the graph; names the pass that failed.

Passes themselves do none of this. Dumps are numbered through both pipelines: `00-trace.txt`,
`01-canonicalise.txt`, ..., `04-emit.txt`, `05-expert_placement.txt`, ...
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch.fx

from hmc import env
from hmc.errors import CompileError, PassFailedError, VerifyError
from hmc.graph import PLAIN, NodeMeta, meta
from hmc.graph.printer import graph_text
from hmc.ops import op_of
from hmc.passes.records import Base, GraphPass, Lowered, PlanPass, Target
from hmc.plan import Decision, Phase, Plan, verify_plan
from hmc.plan.options import Options

AnyPass = TypeVar("AnyPass", GraphPass, PlanPass)


def configured(passes: Sequence[AnyPass], options: Options) -> tuple[AnyPass, ...]:
    """The passes with those of the options that their fields name."""
    result = []
    for each in passes:
        known: Any = each
        names = [field.name for field in fields(known) if field.name in Options.model_fields]
        result.append(replace(known, **{name: getattr(options, name) for name in names}))
    return tuple(result)


def run_graph(passes: Sequence[GraphPass], graph: torch.fx.GraphModule, target: Target) -> Lowered:
    """Run the passes in order over a traced `graph`, which is changed in place."""
    verify_graph(graph)
    watch = _Watch(1, lambda: graph_text(graph.graph))
    decisions: list[Decision] = []
    for each in passes:
        with watch.over(each.name) as made:
            shape = _shape(graph)
            try:
                made += each.run(graph, target)
                if _shape(graph) != shape:
                    graph.graph.lint()
                    graph.recompile()
            except RuntimeError as error:
                raise PassFailedError(f"it left a broken graph: {error}") from error
            verify_graph(graph)
        decisions += made
    return Lowered(graph, target, tuple(decisions))


def run_plan(passes: Sequence[PlanPass], base: Base, number: int = 5) -> Plan:
    """Run the passes in order over an emitted plan; the dump of the first has `number`. What comes
    out is verified; where it is wrong, the plans before it tell after which pass it was.
    """
    plan = base.plan
    plans = [("emit", plan)]
    watch = _Watch(number, lambda: plan_text(plan))
    env.dump(f"{number - 1:02d}-emit.txt", plan_text(plan) if env.dump_dir() else "")
    try:
        for each in passes:
            with watch.over(each.name) as made:
                before, plan = plan, each.run(plan, base)
                made += plan.decisions[len(before.decisions) :]
            plans.append((each.name, plan))
        verify_plan(plan)
    except Exception:  # raised again: a pass may have stumbled over what another one broke
        for name, each_plan in plans:
            try:
                verify_plan(each_plan)
            except VerifyError as error:
                raise VerifyError(f"after pass {name}: {error}") from error
        raise
    return plan


class _Watch:
    """What is done around every pass; `text` gives what is worked on as text, when asked for."""

    def __init__(self, number: int, text: Callable[[], str]) -> None:
        self._number, self._text = number, text
        self._before = text() if _wants_text() else ""

    @contextmanager
    def over(self, name: str) -> Iterator[list[Decision]]:
        """A pass runs in the `with` block and adds its decisions to the list; its errors name it.
        What it did is printed and dumped as far as `HMC_DEBUG` and `HMC_DUMP` ask for it.
        """
        started, made = time.perf_counter(), list[Decision]()
        try:
            yield made
        except VerifyError as error:
            raise VerifyError(f"after pass {name}: {error}") from error
        except CompileError as error:
            raise type(error)(f"pass {name}: {error}") from error
        env.debug(1, f"{name}: {(time.perf_counter() - started) * 1e3:.1f} ms")
        for decision in made:
            env.debug(1, f"  {decision.subject}: {decision.choice} ({decision.reason})")
        if _wants_text():
            before, self._before = self._before.splitlines(), self._text()
            diff = difflib.unified_diff(before, self._before.splitlines(), lineterm="", n=0)
            env.debug(2, "\n".join(line for line in diff if not line.startswith(("---", "+++"))))
            env.debug(3, self._before)
            env.dump(f"{self._number:02d}-{name}.txt", self._before)
        self._number += 1


def plan_text(plan: Plan) -> str:
    """What plan passes change, a line a step: for dumps and diffs."""
    lines = [f"context {plan.limits.max_context}, cache {plan.kv.capacity_tokens} tokens"]
    for placement in plan.placement:
        tiers = ", ".join(f"{tier} {text}" for tier, text in placement.tiers.items())
        lines.append(f"experts of layer {placement.layer}: {tiers}")
    for phase in plan.phases:
        lines += _phase_lines(phase)
    lines += [f"{each.phase} from {each.tokens} ({each.kind})" for each in plan.switches]
    lines += [f"{each.device} {each.kind}: {each.bytes} B" for each in plan.ledger]
    return "".join(f"{line}\n" for line in lines)


def _phase_lines(phase: Phase) -> Iterator[str]:
    yield f"phase {phase.name}: up to {phase.max_tokens} tokens"
    for step in phase.steps:
        into, out = (
            " ".join(f"{role}={operand.buffer}" for role, operand in operands.items())
            for operands in (step.inputs, step.outputs)
        )
        some = f"[{step.attrs['range']}]" if "range" in step.attrs else ""
        events = [f"waits {each}" for each in step.waits]
        events += [f"signals {step.signal}"] if step.signal >= 0 else []
        layer = f"@{step.layer}" if step.layer >= 0 else ""
        parts = [f"  {step.resource} {step.op}{layer}{some}", f"({into}) -> ({out})", *events]
        yield " ".join(parts)


def verify_graph(graph: torch.fx.GraphModule) -> None:
    """Every node carries a `NodeMeta` of a known kind, with as many inputs as its kind has; else
    `VerifyError`.
    """
    for node in graph.graph.nodes:
        found = node.meta.get("hmc")
        if not isinstance(found, NodeMeta):
            raise VerifyError(f"node {node.name} carries no NodeMeta")
        if found.kind in PLAIN:
            continue
        row = op_of(found.kind)
        values = sum(_values(arg) for arg in node.args if isinstance(arg, torch.fx.Node))
        least = sum(not role.optional for role in row.graph_inputs)
        if not least <= values <= len(row.inputs):
            raise VerifyError(
                f"node {node.name} ({found.kind}) has {values} inputs,"
                f" not {least}..{len(row.inputs)}"
            )
        names = {name for name, _ in found.attrs}
        if odd := sorted(names - set(row.attrs) - set(row.extra) | (set(row.attrs) - names)):
            raise VerifyError(f"node {node.name} ({found.kind}): attributes {', '.join(odd)}")
        if found.width <= 0:
            raise VerifyError(f"node {node.name} ({found.kind}) has no width")


def _values(node: torch.fx.Node) -> int:
    """How many operands a value stands for: all results of an op, one of an item."""
    kind = meta(node).kind
    return 1 if kind in PLAIN else len(op_of(kind).outputs)


def _shape(graph: torch.fx.GraphModule) -> list[tuple[object, ...]]:
    """Everything that code made from the graph depends on."""
    return [(node, node.op, node.target, node.args, node.kwargs) for node in graph.graph.nodes]


def _wants_text() -> bool:
    return env.debug_level() >= 2 or env.dump_dir() is not None
