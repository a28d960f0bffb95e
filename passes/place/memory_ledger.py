"""Accounts for weights and cache by device and kind, and sets the context length that fits.

Contract
    * requires "placed"; establishes "ledger"
    * `limits`, `kv` and `ledger` of the context are filled; what running the phases takes is added
      when all are there (`phase_memory.py`)
    * with a GPU budget, the dense part and the cache are on gpu0, experts where placement has them,
      and the context length is the budget's
    * an explicit context length is kept; else it is the largest that leaves a tenth of the memory
      free, at most 32,768 and the model's own
    * a machine too small is no error here: plans are made for machines that are not at hand. The
      ledger shows it, and a run refuses
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from hmc.errors import PassFailedError, UsageError
from hmc.graph import NodeMeta, meta
from hmc.ops import OPS, State
from hmc.passes.context import Context, stored_bytes
from hmc.passes.place.nodes import hosted_nodes, routed_nodes
from hmc.plan import KVLayout, LedgerItem, Limits, state_groups
from hmc.plan.verify import expert_ranges

DEFAULT_CONTEXT = 32_768
_SMALLEST_CONTEXT = 1_024
_RESERVE = 0.1


@dataclass(frozen=True)
class MemoryLedger:
    """Fills `context.limits`, `context.kv` and `context.ledger`."""

    name: ClassVar[str] = "memory_ledger"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    establishes: ClassVar[frozenset[str]] = frozenset({"ledger"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        kinds = weight_kinds(graph, context)
        weights = sum(kinds.values())
        if context.budget is None:
            for kind, total in sorted(kinds.items()):
                context.ledger.append(
                    LedgerItem(device="host", kind=kind, bytes=total, detail="weights")
                )
        else:
            context.ledger.extend(_hybrid_items(graph, context, kinds))
        layout = cache_layout(graph, context)
        budget, sequences = context.budget, context.options.concurrency
        if budget is None:
            tokens = self._context_length(context, layout, weights)
        else:
            tokens = budget.tokens
            context.decide(
                self.name,
                "context length",
                f"{tokens} tokens, {sequences} sequence(s)",
                f"the model allows {context.info.context}; gpu0 holds {budget.dense / 1e9:.1f} GB"
                f" of dense weights and {budget.cache / 1e9:.1f} GB of cache in"
                f" {budget.usable[0] / 1e9:.1f} GB",
            )
        block = layout.block
        capacity = -(-tokens // block) * block * sequences + block * (context.options.max_batch - 1)
        context.kv = layout.model_copy(update={"capacity_tokens": capacity})
        context.limits = Limits(
            max_context=tokens,
            max_chunk=min(context.options.max_chunk, tokens),
            max_batch=context.options.max_batch,
        )
        home = "host" if budget is None else "gpu0"
        context.ledger.append(
            LedgerItem(
                device=home,
                kind="KV cache",
                bytes=capacity * layout.bytes_per_token,
                detail=f"{capacity} tokens x {layout.bytes_per_token} B",
            )
        )
        if each := layout.bytes_per_sequence:
            kept = f"{layout.snapshots} snapshots" if layout.snapshots else "no prompt reused"
            context.ledger.append(
                LedgerItem(
                    device=home,
                    kind="sequence states",
                    bytes=layout.slots * each,
                    detail=f"{layout.sequences} sequences, {kept}, {each} B each",
                )
            )

    def _context_length(self, context: Context, layout: KVLayout, weights: int) -> int:
        asked, model = context.options.max_context, context.info.context
        if asked:
            if model and asked > model:
                raise UsageError(
                    f"--max-context {asked}: the model's context is {model} tokens"
                    " (max_position_embeddings)"
                )
            context.decide(self.name, "context length", f"{asked} tokens", "asked for")
            return asked
        free = int(context.machine.memory_bytes * (1 - _RESERVE)) - weights
        free -= layout.slots * layout.bytes_per_sequence
        fits = max(0, free) // max(1, layout.bytes_per_token)
        limit = min(DEFAULT_CONTEXT, model or DEFAULT_CONTEXT)
        tokens = max(min(fits // 256 * 256, limit), min(_SMALLEST_CONTEXT, limit))
        context.decide(
            self.name,
            "context length",
            f"{tokens} tokens",
            f"the model allows {model}, memory beside {weights / 1e9:.1f} GB of weights holds"
            f" {fits}, the default is at most {DEFAULT_CONTEXT}; --max-context asks for more or"
            " less",
        )
        return tokens


def weight_kinds(graph: torch.fx.GraphModule, context: Context) -> dict[str, int]:
    """Stored bytes of all weights by kind; those of experts under "routed experts"."""
    kinds: dict[str, int] = {}
    for node in graph.graph.nodes:
        for weight in meta(node).weights:
            total = sum(stored_bytes(source) for source in context.source(weight))
            kind = "routed experts" if weight.experts else _kind_of(meta(node))
            kinds[kind] = kinds.get(kind, 0) + total
    return kinds


def _hybrid_items(
    graph: torch.fx.GraphModule, context: Context, kinds: dict[str, int]
) -> list[LedgerItem]:
    """Weights of a plan with GPUs: the dense part on gpu0, the embedding table on the host, experts
    where they were placed."""
    table = sum(
        stored_bytes(context.source(weight)[0])
        for node in hosted_nodes(graph)
        for weight in node.weights
    )
    homes: dict[tuple[str, str], int] = {("host", "embedding and output"): table}
    for kind, total in kinds.items():
        if kind != "routed experts":
            inside = table if kind == "embedding and output" else 0
            homes["gpu0", kind] = total - inside
    tiers = {placement.layer: placement.tiers for placement in context.placement}
    for found in routed_nodes(graph):
        columns = [context.source(weight) for weight in found.weights]
        for tier, text in tiers[found.layer].items():
            size = sum(stored_bytes(column[e]) for column in columns for e in expert_ranges(text))
            homes[tier, "routed experts"] = homes.get((tier, "routed experts"), 0) + size
    return [
        LedgerItem(device=device, kind=kind, bytes=total, detail="weights")
        for (device, kind), total in sorted(homes.items())
        if total
    ]


def _kind_of(node: NodeMeta) -> str:
    row = OPS[node.kind]
    if row.where == "host" or (row.matmul and node.section == "head"):
        return "embedding and output"
    if row.family in ("norms and sums", "routing"):
        return "norms and router biases"
    if node.section == "attention":
        return "attention"
    return "routers" if dict(node.attrs).get("router") else "shared experts and dense MLPs"


def cache_layout(graph: torch.fx.GraphModule, context: Context) -> KVLayout:
    """What layers keep between calls, by the rows of their ops; without its capacity in tokens.

    `PassFailedError` where two nodes of a layer keep states of the same name.
    """
    kept: list[tuple[int, tuple[State, ...]]] = []
    named: set[tuple[int, str]] = set()
    for node in graph.graph.nodes:
        found = meta(node)
        states = OPS[found.kind].states(dict(found.attrs)) if found.kind in OPS else ()
        for state in states:
            if (found.layer, state.name) in named:
                raise PassFailedError(
                    f"{node.name}: another node of layer {found.layer} keeps a state {state.name}"
                )
            named.add((found.layer, state.name))
        kept.append((found.layer, states))
    options = context.options
    layout = KVLayout(
        block=options.kv_block,
        capacity_tokens=0,
        sequences=options.max_batch,
        groups=state_groups(kept),
    )
    if not (each := layout.bytes_per_sequence):
        return layout
    pages = -(-(options.max_context or DEFAULT_CONTEXT) // options.kv_block)
    pages = pages * options.concurrency + options.max_batch - 1
    return layout.model_copy(update={"snapshots": min(options.snapshot_bytes // each, pages)})
