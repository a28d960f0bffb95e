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
from hmc.graph import KINDS, NodeMeta
from hmc.graph.printer import graph_text
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
    arity = {
        "embedding": (1, 1),
        "norm": (1, 1),
        "linear": (1, 1),
        "rotary": (2, 2),
        "attention": (3, 3),
        "mla": (3, 3),
        "route": (1, 1),
        "experts": (2, 2),
        "silu_mul": (2, 2),
        "gate_up": (1, 1),
        "add": (2, 3),
        "add_norm": (2, 3),
        "item": (1, 1),
    }
    for node in graph.graph.nodes:
        found = node.meta.get("hmc")
        if not isinstance(found, NodeMeta):
            raise VerifyError(f"node {node.name} carries no NodeMeta")
        if found.kind not in KINDS:
            raise VerifyError(f"node {node.name} is of unknown kind {found.kind}")
        low, high = arity.get(found.kind, (0, 99))
        if not low <= len(node.all_input_nodes) <= high:
            # fx lists an input used twice once: h + h would be such a case
            raise VerifyError(
                f"node {node.name} ({found.kind}) has {len(node.all_input_nodes)} inputs,"
                f" not {low}..{high}"
            )
        if found.width <= 0 and found.kind not in ("input", "output"):
            raise VerifyError(f"node {node.name} ({found.kind}) has no width")


def _shape(graph: torch.fx.GraphModule) -> list[tuple[object, ...]]:
    """Everything that code made from the graph depends on."""
    return [(node, node.op, node.target, node.args, node.kwargs) for node in graph.graph.nodes]


def _wants_text() -> bool:
    return env.debug_level() >= 2 or env.dump_dir() is not None
