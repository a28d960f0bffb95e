"""What the stages of a compilation hand each other, each a frozen record that the next takes:

    Target  -> graph passes -> Lowered -> Needs -> Capacity -> emit -> Base -> plan passes -> Plan

and what passes share: their two protocols, how they note decisions, how they rewrite a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch.fx

from hmc.blocks import Block
from hmc.checkpoint import Checkpoint, InventedCheckpoint, WeightSource
from hmc.graph import NodeMeta, WeightSpec
from hmc.machine.model import Machine
from hmc.plan import Decision, KVLayout, Limits, ModelInfo, Plan

BLOCK = 64
"""Tokens that a block of the paged cache holds."""
DEFAULT_CONTEXT = 32_768
"""Tokens of context that nobody needs to ask for."""


@dataclass(frozen=True)
class Target:
    """What is compiled, and for what: a model's checkpoint, a machine, its kernel tier."""

    checkpoint: Checkpoint
    info: ModelInfo
    machine: Machine
    isa: str
    _found: dict[str, list[WeightSource]] = field(default_factory=dict, repr=False, compare=False)

    def source(self, weight: WeightSpec) -> list[WeightSource]:
        """Where a weight is stored and how: one entry, or one for every expert. Cached by name."""
        if weight.key not in self._found:
            if weight.experts:
                found = self.checkpoint.resolve_experts(
                    weight.name, weight.experts, weight.shape, weight.view, linear=weight.linear
                )
            else:
                stored = self.checkpoint
                if isinstance(stored, InventedCheckpoint) and weight.dtype:
                    stored = replace(stored, dtype=weight.dtype)
                how: dict[str, Any] = {"linear": weight.linear, "view": weight.view}
                found = [stored.resolve(weight.name, weight.shape, **how)]
            self._found[weight.key] = found
        return self._found[weight.key]


@dataclass(frozen=True)
class Lowered:
    """A graph whose nodes carry formats and kernels, and what was decided on the way."""

    graph: torch.fx.GraphModule
    target: Target
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Needs:
    """What a model takes of memory, wherever its parts will be; in bytes as stored.

    `kinds` are those of all weights but routed experts, by the ledger's words; `table` of them the
    embedding table; `experts` all routed experts and `layer` the largest layer's. `cache` has no
    capacity yet; `stream_token` are activations of one token in a streamed prefill, roughly.
    `dense_unread` and `experts_unread` say which of the dense part's and of the experts' formats
    kernels of GPUs cannot read, and why; "" where they read all.
    """

    kinds: Mapping[str, int]
    table: int
    experts: int
    layer: int
    cache: KVLayout
    stream_token: int
    dense_unread: str = ""
    experts_unread: str = ""

    @property
    def dense(self) -> int:
        """Attention, shared experts, norms and output: what a GPU holds before any expert."""
        return sum(self.kinds.values()) - self.table


@dataclass(frozen=True)
class Budget:
    """How a hybrid plan divides its GPUs, in bytes: `dense` and `cache` on gpu0 for decode,
    `workspace` on each, `experts` left for resident experts on each; `usable` of each GPU in all.
    Contexts are of `tokens` tokens, the cache holds `held` in all; streamed prefill may have `ring`
    bytes of slots and takes `stream_token` bytes of activations a token, roughly.
    """

    usable: tuple[int, ...]
    dense: int
    cache: int
    workspace: int
    ring: int
    experts: tuple[int, ...]
    tokens: int
    held: int
    stream_token: int


@dataclass(frozen=True)
class Capacity:
    """What a run may ask for, the cache for it, and the GPUs' budget; None: the CPU alone."""

    limits: Limits
    kv: KVLayout
    budget: Budget | None
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Base:
    """Where plan passes start: the plan as emitted, for the CPU alone, and what it was sized by."""

    plan: Plan
    needs: Needs
    budget: Budget | None


@dataclass
class Notes:
    """The decisions of one pass, in order."""

    by: str
    made: list[Decision] = field(default_factory=list)

    def decide(self, subject: str, choice: str, reason: str) -> None:
        """Note a decision with its reason."""
        self.made.append(Decision(by=self.by, subject=subject, choice=choice, reason=reason))

    def on(self, plan: Plan, **changes: Any) -> Plan:
        """The plan with changes to its fields, and these decisions added."""
        decisions = (*plan.decisions, *self.made)
        return plan.model_copy(update={**changes, "decisions": decisions})


class GraphPass(Protocol):
    """One rewrite of the traced graph. Like every pass a frozen dataclass, whose fields are its
    options, named as in `hmc.plan.options.Options`.
    """

    name: ClassVar[str]

    def run(self, graph: torch.fx.GraphModule, target: Target) -> Sequence[Decision]:
        """Rewrite `graph` in place; raise `PassFailedError` on a graph it cannot handle."""
        ...


class PlanPass(Protocol):
    """One rewrite of the plan, which keeps the rules (hmc/plan/verify.py) after every pass."""

    name: ClassVar[str]

    def run(self, plan: Plan, base: Base) -> Plan:
        """The plan changed; `plan` itself where there is nothing to do."""
        ...


def submodule(graph: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
    """The module that a call_module node calls; None for any other node."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def put_block(
    graph: torch.fx.GraphModule,
    before: torch.fx.Node,
    name: str,
    block: Block,
    inputs: Sequence[Any],
    like: NodeMeta,
    weights: tuple[WeightSpec, ...] = (),
) -> torch.fx.Node:
    """A call of a block, added to the graph as `name`, right before a node, and in the layer and
    section of what it is made from.
    """
    graph.add_submodule(name, block)
    with graph.graph.inserting_before(before):
        node = graph.graph.call_module(name, tuple(inputs))
    node.meta["hmc"] = block.meta(like.layer, like.section, weights)
    return node
