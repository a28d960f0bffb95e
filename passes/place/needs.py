"""What a model takes of memory, read once from the lowered graph, before anything is placed."""

from __future__ import annotations

from hmc.checkpoint import WeightSource
from hmc.codegen.triton.layout import unread
from hmc.errors import PassFailedError
from hmc.formats import format_of
from hmc.graph import NodeMeta, WeightSpec, meta
from hmc.ops import OPS, State
from hmc.passes.records import BLOCK, DEFAULT_CONTEXT, Lowered, Needs
from hmc.plan import DTYPE_BYTES, KVLayout, state_groups
from hmc.plan.options import Options


def needs_of(lowered: Lowered, options: Options) -> Needs:
    """The needs of a graph; `PassFailedError` where two nodes of a layer keep a state of the same
    name.
    """
    kinds: dict[str, int] = {}
    table = experts = largest = 0
    dense_unread = experts_unread = ""
    nodes = [found for node in lowered.graph.graph.nodes if (found := meta(node)).kind in OPS]
    for found in nodes:
        layer = 0
        for weight in found.weights:
            sources = lowered.target.source(weight)
            size = sum(source.nbytes for source in sources)
            if weight.experts:
                layer += size
                experts_unread = experts_unread or _unread(found, weight, sources[0])
            else:
                dense_unread = dense_unread or _unread(found, weight, sources[0])
                kind = _kind_of(found)
                kinds[kind] = kinds.get(kind, 0) + size
                table += size if OPS[found.kind].where == "host" else 0
        experts += layer
        largest = max(largest, layer)
    return Needs(
        kinds=kinds,
        table=table,
        experts=experts,
        layer=largest,
        cache=_cache_layout(nodes, options),
        stream_token=_stream_bytes(nodes),
        dense_unread=dense_unread,
        experts_unread=experts_unread,
    )


def _unread(node: NodeMeta, weight: WeightSpec, source: WeightSource) -> str:
    """Why kernels of GPUs cannot read a matrix that they would multiply by; else ""."""
    row, role = OPS[node.kind], OPS[node.kind].weight(weight.role)
    if not row.triton or role is None or not role.matmul:
        return ""
    return unread(format_of(source.format), source.dtypes, source.group)


def _kind_of(node: NodeMeta) -> str:
    row = OPS[node.kind]
    if row.where == "host" or (row.matmul and node.section == "head"):
        return "embedding and output"
    if row.family in ("norms and sums", "routing"):
        return "norms and router biases"
    if node.section == "attention":
        return "attention"
    return "routers" if dict(node.attrs).get("router") else "shared experts and dense MLPs"


def _stream_bytes(nodes: list[NodeMeta]) -> int:
    """Activation bytes of one token in a streamed prefill, estimated before its buffers are laid
    out: the two widest results, and eight rows of the residual stream for the sums around them and
    the gathered rows of a group of experts.
    """
    results = [
        found.width * DTYPE_BYTES[found.dtype]
        for found in nodes
        if found.layer >= 0 and (OPS[found.kind].attends or OPS[found.kind].matmul)
    ]
    hidden = next(found.width for found in nodes if OPS[found.kind].where == "host")
    widest = sorted(results)[-2:]
    return sum(widest) + 8 * 4 * hidden


def _cache_layout(nodes: list[NodeMeta], options: Options) -> KVLayout:
    """What layers keep between calls, by the rows of their ops; without its capacity in tokens."""
    kept: list[tuple[int, tuple[State, ...]]] = []
    named: set[tuple[int, str]] = set()
    for found in nodes:
        states = OPS[found.kind].states(dict(found.attrs))
        for state in states:
            if (found.layer, state.name) in named:
                raise PassFailedError(f"two nodes of layer {found.layer} keep a state {state.name}")
            named.add((found.layer, state.name))
        kept.append((found.layer, states))
    layout = KVLayout(
        block=BLOCK, capacity_tokens=0, sequences=options.max_batch, groups=state_groups(kept)
    )
    pages = -(-(options.max_context or DEFAULT_CONTEXT) // BLOCK) * options.concurrency
    return with_snapshots(layout, options, pages + options.max_batch - 1)


def with_snapshots(layout: KVLayout, options: Options, pages: int) -> KVLayout:
    """The layout with as many snapshots as the options allow: at most one for each of so many
    pages; none where all states are in pages that prompts can share.
    """
    if not (each := layout.bytes_per_snapshot):
        return layout
    most = min(options.snapshot_bytes // each, pages)
    return layout.model_copy(update={"snapshots": most})
