"""What a model takes of memory, read once from the lowered graph, before anything is placed."""

from __future__ import annotations

from hmc.errors import PassFailedError
from hmc.graph import NodeMeta, meta
from hmc.ops import OPS
from hmc.passes.records import BLOCK, Lowered, Needs, stored_bytes
from hmc.plan import DTYPE_BYTES, KVLayout


def needs_of(lowered: Lowered) -> Needs:
    """The needs of a graph; `PassFailedError` when the KV caches of its layers differ."""
    kinds: dict[str, int] = {}
    table = experts = largest = 0
    nodes = [found for node in lowered.graph.graph.nodes if (found := meta(node)).kind in OPS]
    for found in nodes:
        layer = 0
        for weight in found.weights:
            size = sum(stored_bytes(source) for source in lowered.target.source(weight))
            if weight.experts:
                layer += size
            else:
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
        cache=_cache_layout(nodes),
        stream_token=_stream_bytes(nodes),
    )


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


def _cache_layout(nodes: list[NodeMeta]) -> KVLayout:
    """The cache's layout, without its capacity."""
    layers: list[int] = []
    widths: set[tuple[str, tuple[int, ...]]] = set()
    for found in nodes:
        if not (states := OPS[found.kind].states(dict(found.attrs))):
            continue
        kind = "gqa" if len(states) > 1 else "mla"
        widths.add((kind, tuple(state.width for state in states)))
        layers.append(found.layer)
    if len(widths) != 1:
        raise PassFailedError(
            "the layers' KV caches differ in shape, or the model has no attention"
        )
    kind, width = widths.pop()
    return KVLayout(
        kind=kind,  # type: ignore[arg-type]
        block=BLOCK,
        widths=width,
        layers=tuple(layers),
        capacity_tokens=0,
    )
