"""What passes share: the options, the checkpoint's view of weights, and what earlier passes
decided.

A pass reads and fills a `Context`; the graph it rewrites carries everything that belongs to a node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch.fx

from hmc.checkpoint import Checkpoint, WeightSource
from hmc.codegen.spec import KernelSpec
from hmc.graph import NodeMeta, WeightSpec
from hmc.machine import Machine
from hmc.passes.routing_profile import RoutingProfile
from hmc.plan import Decision, KVLayout, LayerPlacement, LedgerItem, Limits, ModelInfo, Phase, Plan


@dataclass(frozen=True)
class Options:
    """What the user asks of a compilation; 0 means: let the passes decide.

    `vram` bytes of each GPU may be used (0: all); the cache holds `concurrency` sequences of
    `max_context` tokens; `ring` experts fit into the slots of a streamed prefill; `profile` are
    recorded routing counts. Of models that keep states a sequence, `snapshot_bytes` may hold those
    of prompts, for others that begin alike.
    """

    max_context: int = 0
    max_chunk: int = 512
    max_batch: int = 16
    threads: int = 0
    kv_block: int = 64
    vram: int = 0
    concurrency: int = 1
    ring: int = 0
    profile: RoutingProfile | None = None
    snapshot_bytes: int = 1 << 30


@dataclass(frozen=True)
class Budget:
    """How a hybrid plan divides its GPUs, in bytes: `dense` and `cache` on gpu0 for decode,
    `workspace` on each, `experts` left for resident experts on each; `usable` of each GPU in all.
    The cache holds `tokens` tokens of each sequence, and streamed prefill may have `ring` bytes of
    slots and takes `stream_token` bytes of activations a token, roughly.
    """

    usable: tuple[int, ...]
    dense: int
    cache: int
    workspace: int
    ring: int
    experts: tuple[int, ...]
    tokens: int
    stream_token: int


@dataclass
class Context:
    """State of one compilation. The fields from `sources` on are filled by passes, in the order
    given.
    """

    checkpoint: Checkpoint
    info: ModelInfo
    machine: Machine
    isa: str
    options: Options
    decisions: list[Decision] = field(default_factory=list)
    sources: dict[str, list[WeightSource]] = field(default_factory=dict)
    kernels: dict[str, KernelSpec] = field(default_factory=dict)
    budget: Budget | None = None
    placement: tuple[LayerPlacement, ...] = ()
    limits: Limits | None = None
    kv: KVLayout | None = None
    ledger: list[LedgerItem] = field(default_factory=list)
    bases: dict[str, Phase] = field(default_factory=dict)
    plan: Plan | None = None

    def source(self, weight: WeightSpec) -> list[WeightSource]:
        """Where a weight is stored and how: one entry, or one for every expert. Cached by name."""
        if weight.name not in self.sources:
            if weight.experts:
                found = self.checkpoint.resolve_experts(weight.name, weight.experts, weight.shape)
            else:
                found = [self.checkpoint.resolve(weight.name, weight.shape, linear=weight.linear)]
            self.sources[weight.name] = found
        return self.sources[weight.name]

    def decide(self, by: str, subject: str, choice: str, reason: str) -> None:
        """Record a decision with its reason."""
        self.decisions.append(Decision(by=by, subject=subject, choice=choice, reason=reason))


class Pass(Protocol):
    """One rewrite or analysis: a frozen dataclass whose fields are its options.

    `requires` and `establishes` name properties of graph and context ("canonical", "fused",
    "kernels", ...): the manager refuses a pipeline in which a requirement was not established
    before.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    establishes: ClassVar[frozenset[str]]

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        """Rewrite `graph` in place; raise `PassFailedError` on a graph it cannot handle."""
        ...


def stored_bytes(source: WeightSource) -> int:
    """Bytes of a stored weight with its scales."""
    return source.data.nbytes + (source.scale.nbytes if source.scale else 0)


def ranges(numbers: Iterable[int]) -> str:
    """Sorted whole numbers as text: 0-3,7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def submodule(graph: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
    """The module that a call_module node calls; None for any other node."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def replace_with_module(
    graph: torch.fx.GraphModule,
    old: torch.fx.Node,
    name: str,
    module: torch.nn.Module,
    inputs: tuple[torch.fx.Node, ...],
    meta: NodeMeta,
) -> torch.fx.Node:
    """A call of `module`, added to the graph as `name`, right before `old` and instead of it for
    its users.
    """
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(old):
        node = graph.graph.call_module(name, inputs)
    node.meta["hmc"] = meta
    old.replace_all_uses_with(node)
    return node
