"""Runs passes: verifies, times, dumps and diffs after each, lints and recompiles where one changed
the graph; names the pass that failed.

Passes themselves do none of this. The properties a pass requires are checked against what earlier
ones established.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence

import torch.fx

from hmc import env
from hmc.errors import CompileError, PassFailedError, VerifyError
from hmc.graph import PLAIN, NodeMeta, meta
from hmc.graph.printer import graph_text
from hmc.ops import op_of
from hmc.passes.context import Context, Pass


def run_pipeline(
    pipeline: Sequence[Pass], graph: torch.fx.GraphModule, context: Context
) -> torch.fx.GraphModule:
    """Run the passes in order over `graph` (changed in place and returned)."""
    established: set[str] = {"traced"}
    verify_graph(graph)
    before = graph_text(graph.graph) if _wants_text() else ""
    for number, each in enumerate(pipeline, start=1):
        if missing := each.requires - established:
            raise PassFailedError(
                f"pass {each.name} requires {', '.join(sorted(missing))}, which no earlier pass"
                " establishes"
            )
        decided = len(context.decisions)
        started = time.perf_counter()
        shape = _shape(graph)
        try:
            each.run(graph, context)
            if _shape(graph) != shape:
                graph.graph.lint()
                graph.recompile()
            verify_graph(graph)
        except VerifyError as error:
            raise VerifyError(f"after pass {each.name}: {error}") from error
        except RuntimeError as error:
            raise PassFailedError(f"pass {each.name} left a broken graph: {error}") from error
        except CompileError as error:
            raise type(error)(f"pass {each.name}: {error}") from error
        established |= each.establishes
        seconds = time.perf_counter() - started
        env.debug(1, f"{each.name}: {seconds * 1e3:.1f} ms")
        for decision in context.decisions[decided:]:
            env.debug(1, f"  {decision.subject}: {decision.choice} ({decision.reason})")
        if _wants_text():
            after = graph_text(graph.graph)
            diff = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
            env.debug(2, "\n".join(line for line in diff if not line.startswith(("---", "+++"))))
            env.debug(3, after)
            env.dump(f"{number:02d}-{each.name}.txt", after)
            before = after
    return graph


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
