"""Divides the memory of the GPUs before experts are placed: attention, shared experts and norms
first, then the cache, then what streamed prefill needs, then experts.

Nothing is placed on GPUs of a machine that declares no rates, or that cannot hold the dense part;
both are recorded as decisions.
"""

from __future__ import annotations

import torch.fx

from hmc.errors import CapacityError, UsageError
from hmc.graph import meta
from hmc.ops import OPS
from hmc.passes.context import Budget, Context, stored_bytes
from hmc.passes.place.memory_ledger import DEFAULT_CONTEXT, cache_layout, weight_kinds
from hmc.passes.place.nodes import hosted_nodes, routed_nodes
from hmc.plan import KVLayout
from hmc.plan.memory import SCRATCH, context_scratch

_RESERVE = 0.04
"""Share of a GPU's memory left to its driver, its libraries and fragmentation."""
_SMALLEST = 1_024


def divide(graph: torch.fx.GraphModule, context: Context) -> Budget | None:
    """The budget of a hybrid plan, or None (with a decision) where the CPU works alone.

    Raises `CapacityError` when an explicit context length, concurrency or --vram cannot be met; it
    names what binds and what would lift it.
    """
    machine, options = context.machine, context.options
    if not machine.gpus:
        return None
    if not machine.hybrid:
        context.decide(
            "expert_placement",
            "GPUs",
            "unused",
            f"machine {machine.name} declares {len(machine.gpus)} GPU(s) without rates: what"
            " would be gained is unknown until they are measured (`hmc probe`)",
        )
        return None
    usable = tuple(
        int(min(gpu.memory_bytes, options.vram or gpu.memory_bytes) * (1 - _RESERVE))
        for gpu in machine.gpus
    )
    kinds = weight_kinds(graph, context)
    experts = kinds.pop("routed experts", 0)
    table = _table_bytes(graph, context)
    dense = sum(kinds.values()) - table
    layout = cache_layout(graph, context)
    per_token = layout.bytes_per_token
    stream_token = stream_bytes_per_token(graph)
    workspace = _workspace(context, stream_token)
    tokens = _tokens(context, usable[0], dense, workspace, layout)
    if tokens == 0:
        return None
    attention = context_scratch(layout, tokens)
    workspace += attention
    cache = per_token * (tokens * options.concurrency + _partial_blocks(context))
    cache += layout.slots * layout.bytes_per_sequence
    room = [
        usable[0] - dense - cache - workspace,
        *(each - SCRATCH - attention for each in usable[1:]),
    ]
    if sum(room) >= experts or not experts:
        return Budget(usable, dense, cache, workspace, 0, tuple(room), tokens, stream_token)
    layer = max(
        sum(stored_bytes(context.source(weight)[0]) * weight.experts for weight in found.weights)
        for found in routed_nodes(graph)
    )
    ranks = len(usable)
    window = 2 * _section(kinds, context)
    activations = stream_token * tokens // ranks
    left = [
        usable[0] - activations - window - cache - workspace,
        *(each - activations - window - SCRATCH - attention for each in usable[1:]),
    ]
    asked = options.ring * (layer // context.info.experts)
    ring = max(0, min(layer // ranks, asked or layer, *left))
    head = kinds.get("embedding and output", 0) - table
    slots = max(ring, head - window)  # the output layer lies over the others
    room = [max(0, min(one, other - slots)) for one, other in zip(room, left, strict=True)]
    return Budget(usable, dense, cache, workspace, ring, tuple(room), tokens, stream_token)


def _partial_blocks(context: Context) -> int:
    """Tokens of cache that many sequences at once may waste in blocks that are not full."""
    return context.options.kv_block * (context.options.max_batch - 1)


def _workspace(context: Context, token: int) -> int:
    """Bytes of gpu0 for temporaries, activations of a decode step and of a prefill chunk, and their
    logits."""
    rows = context.options.max_chunk + context.options.max_batch
    logits = rows + context.options.max_batch  # a streamed prompt has its own
    return SCRATCH + rows * token + 4 * context.info.vocab * logits


def stream_bytes_per_token(graph: torch.fx.GraphModule) -> int:
    """Activation bytes of one token in a streamed prefill, estimated before its buffers are laid
    out: the two widest results, and eight rows of the residual stream for the sums around them and
    the gathered rows of a group of experts.
    """
    size = {"f32": 4, "bf16": 2, "i32": 4}
    results = [
        found.width * size[found.dtype]
        for node in graph.graph.nodes
        if (found := meta(node)).layer >= 0
        and found.kind in OPS
        and (OPS[found.kind].attends or OPS[found.kind].matmul)
    ]
    hidden = hosted_nodes(graph)[0].width
    widest = sorted(results)[-2:]
    return sum(widest) + 8 * 4 * hidden


def _section(kinds: dict[str, int], context: Context) -> int:
    """Bytes of one layer's dense weights, of which two are on their way or in use; what is before
    and after the layers has no slot of its own."""
    layers = sum(size for kind, size in kinds.items() if kind != "embedding and output")
    return layers // max(1, context.info.layers) * 2


def _table_bytes(graph: torch.fx.GraphModule, context: Context) -> int:
    return sum(
        stored_bytes(context.source(weight)[0])
        for node in hosted_nodes(graph)
        for weight in node.weights
    )


def _tokens(context: Context, usable: int, dense: int, workspace: int, layout: KVLayout) -> int:
    """Context length that fits gpu0, or what was asked for; 0: the dense part is too large."""
    options, model = context.options, context.info.context
    if options.max_context and model and options.max_context > model:
        raise UsageError(
            f"--max-context {options.max_context}: the model's context is {model} tokens"
            " (max_position_embeddings)"
        )
    per_token, attention = layout.bytes_per_token, context_scratch(layout, 1)
    free = usable - dense - workspace - per_token * _partial_blocks(context)
    free -= layout.slots * layout.bytes_per_sequence
    fits = max(0, free) // max(1, per_token * options.concurrency + attention)
    limit = min(DEFAULT_CONTEXT, model or DEFAULT_CONTEXT)
    asked = options.max_context or (limit if options.concurrency > 1 else 0)
    have = f"{usable / 1e9:.1f} GB usable on gpu0"
    if asked and fits < asked:
        need = asked * per_token * options.concurrency
        workspace += attention * asked
        lifts = [f"a GPU with {(dense + workspace + need) / (1 - _RESERVE) / 1e9:.0f} GB"]
        if fits >= _SMALLEST:
            lifts.insert(0, f"--max-context {fits // 256 * 256}")
        if (
            options.concurrency > 1
            and (alone := (free - attention * asked) // (per_token * asked)) >= 1
        ):
            lifts.insert(0, f"--concurrency {alone}")
        if options.vram:
            lifts.insert(0, "a larger --vram")
        raise CapacityError(
            f"memory of gpu0 binds: {dense / 1e9:.1f} GB of attention, shared experts and norms and"
            f" {need / 1e9:.1f} GB of KV cache ({options.concurrency} x {asked} tokens x"
            f" {per_token} B) exceed {have}; what would lift it: {' or '.join(lifts)}"
        )
    if fits < min(_SMALLEST, limit):
        context.decide(
            "expert_placement",
            "GPUs",
            "unused",
            f"attention, shared experts and norms take {dense / 1e9:.1f} GB, activations, logits"
            f" and temporaries {workspace / 1e9:.1f} GB: what is left of {have} holds a cache of"
            f" {fits} tokens",
        )
        return 0
    return asked or min(fits // 256 * 256, limit)
