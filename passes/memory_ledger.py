"""Accounts for every byte a run will take, by device and kind, and sets the context length that
fits.

Contract
    * requires "placed"; establishes "ledger"
    * `limits`, `kv` and `ledger` of the context are filled; activations are added by emit, which
      lays them out
    * an explicit context length is kept; else it is the largest that leaves a tenth of the memory
      free, at most
      32,768 and the model's own
    * a machine too small is no error here: plans are made for machines that are not at hand. The
      ledger shows it, and
      a run refuses
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from hmc.errors import PassFailedError, UsageError
from hmc.graph import NodeMeta, meta
from hmc.passes.context import Context
from hmc.plan import KVLayout, LedgerItem, Limits

_DEFAULT_CONTEXT = 32_768
_SMALLEST_CONTEXT = 1_024
_RESERVE = 0.1


@dataclass(frozen=True)
class MemoryLedger:
    """Fills `context.limits`, `context.kv` and `context.ledger`."""

    name: ClassVar[str] = "memory_ledger"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    establishes: ClassVar[frozenset[str]] = frozenset({"ledger"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        kinds: dict[str, int] = {}
        for node in graph.graph.nodes:
            for weight in meta(node).weights:
                sources = context.source(weight)
                total = sum(
                    source.data.nbytes + (source.scale.nbytes if source.scale else 0)
                    for source in sources
                )
                kind = "routed experts" if weight.experts else _kind_of(meta(node))
                kinds[kind] = kinds.get(kind, 0) + total
        weights = sum(kinds.values())
        for kind, total in sorted(kinds.items()):
            context.ledger.append(
                LedgerItem(device="host", kind=kind, bytes=total, detail="weights")
            )
        layout = _cache_layout(graph, context)
        tokens = self._context_length(context, layout.bytes_per_token, weights)
        block = layout.block
        capacity = -(-tokens // block) * block + block * (context.options.max_batch - 1)
        context.kv = layout.model_copy(update={"capacity_tokens": capacity})
        context.limits = Limits(
            max_context=tokens,
            max_chunk=min(context.options.max_chunk, tokens),
            max_batch=context.options.max_batch,
        )
        context.ledger.append(
            LedgerItem(
                device="host",
                kind="KV cache",
                bytes=capacity * layout.bytes_per_token,
                detail=f"{capacity} tokens x {layout.bytes_per_token} B ({layout.kind})",
            )
        )

    def _context_length(self, context: Context, per_token: int, weights: int) -> int:
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
        fits = max(0, free) // per_token
        limit = min(_DEFAULT_CONTEXT, model or _DEFAULT_CONTEXT)
        tokens = max(min(fits // 256 * 256, limit), min(_SMALLEST_CONTEXT, limit))
        context.decide(
            self.name,
            "context length",
            f"{tokens} tokens",
            f"the model allows {model}, memory beside {weights / 1e9:.1f} GB of weights holds {fits},"
            f" the default is at most {_DEFAULT_CONTEXT}; --max-context asks for more or less",
        )
        return tokens


def _kind_of(node: NodeMeta) -> str:
    if node.kind in ("embedding",) or (node.kind == "linear" and node.layer < 0):
        return "embedding and output"
    if node.kind in ("norm", "add_norm", "route"):
        return "norms and router biases"
    names = " ".join(weight.name for weight in node.weights)
    if "attn" in names or node.kind in ("mla", "rotary"):
        return "attention"
    if node.kind == "linear" and dict(node.attrs).get("router"):
        return "routers"
    return "shared experts and dense MLPs"


def _cache_layout(graph: torch.fx.GraphModule, context: Context) -> KVLayout:
    layers: list[int] = []
    widths: set[tuple[str, tuple[int, ...]]] = set()
    for node in graph.graph.nodes:
        found = meta(node)
        if found.kind == "attention":
            heads = found.attr("kv_heads")
            widths.add(("gqa", (heads * found.attr("head_dim"), heads * found.attr("v_dim"))))
        elif found.kind == "mla":
            widths.add(("mla", (found.attr("rank") + found.attr("rope"),)))
        else:
            continue
        layers.append(found.layer)
    if len(widths) != 1:
        raise PassFailedError(
            "the layers' KV caches differ in shape, or the model has no attention"
        )
    kind, width = widths.pop()
    return KVLayout(
        kind=kind,  # type: ignore[arg-type]
        block=context.options.kv_block,
        widths=width,
        layers=tuple(layers),
        capacity_tokens=0,
    )
