"""Which kernels compute a node, in which phase, from which storage format: a literal table, node
kind -> specs.

`decode` handles up to 16 tokens a call with kernels that read each weight once; `prefill.host` any
number, with tiled ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hmc.codegen.spec import MAX_TOKENS, KernelSpec
from hmc.errors import PassFailedError, UnsupportedError
from hmc.graph import NodeMeta

DECODE, PREFILL = "decode", "prefill.host"
PHASES = (PREFILL, DECODE)


@dataclass(frozen=True)
class Target:
    """What a choice depends on besides the node: tier, tokens a cache block holds, format and group
    of each weight.
    """

    isa: str
    kv_block: int
    formats: Mapping[str, str]
    groups: Mapping[str, int]
    scales: Mapping[str, str]


Chosen = list[KernelSpec]


def choose(node: NodeMeta, phase: str, target: Target) -> Chosen:
    """The kernels of a node in launch order; `PassFailedError` for a kind or format without
    kernels.
    """
    if node.kind not in _TABLE:
        raise PassFailedError(f"no kernel computes a {node.kind} node")
    return _TABLE[node.kind](node, phase, target)


def _spec(
    op: str, target: Target, sizes: Mapping[str, int], weight: str = "", out: str = "f32"
) -> KernelSpec:
    return KernelSpec(op, target.isa, weight, out, tuple(sorted(sizes.items())))


def _embedding(node: NodeMeta, phase: str, target: Target) -> Chosen:
    return [_spec("embed", target, {"width": node.width}, target.formats["table"])]


def _norm(node: NodeMeta, phase: str, target: Target) -> Chosen:
    width = node.width // node.attr("groups")
    gamma = target.formats["gamma"]
    return [_spec("norm", target, {"width": width}, gamma, node.dtype)]


def _add_norm(node: NodeMeta, phase: str, target: Target) -> Chosen:
    gamma = target.formats["gamma"]
    return [_spec("add_norm", target, {"width": node.width}, gamma, "bf16")]


def _add(node: NodeMeta, phase: str, target: Target) -> Chosen:
    return [_spec("add", target, {"width": node.width})]


def _group(target: Target, role: str) -> dict[str, int]:
    """What a kernel must know of int4 scales: columns that share one, and its bits."""
    if target.formats[role] != "int4":
        return {}
    bits = {"F32": 32, "BF16": 16}.get(target.scales[role])
    if bits is None:
        raise UnsupportedError(f"int4 scales in {target.scales[role]}: kernels read BF16 and F32")
    return {"group": target.groups[role], "scale_bits": bits}


def _linear(node: NodeMeta, phase: str, target: Target) -> Chosen:
    weight = node.weight("weight")
    assert weight is not None
    sizes = {"k": weight.shape[1], **_group(target, "weight")}
    form = target.formats["weight"]
    if phase == PREFILL:
        return [_spec("gemm", target, sizes, form)]
    return [_spec("linear", target, {**sizes, "tokens": MAX_TOKENS}, form)]


def _gate_up(node: NodeMeta, phase: str, target: Target) -> Chosen:
    gate = node.weight("gate")
    assert gate is not None
    form, sizes = target.formats["gate"], _group(target, "gate")
    rows, k = gate.shape
    if phase == PREFILL:
        one = {"experts": 1, "top_k": 1, "k": k, "n": rows, "act": 0}
        return [_spec("grouped_gate_up", target, one | sizes, form, "bf16")]
    return [
        _spec("gate_up", target, {"k": k, "tokens": MAX_TOKENS, "act": 0, **sizes}, form, "bf16")
    ]


def _experts(node: NodeMeta, phase: str, target: Target) -> Chosen:
    form, sizes = target.formats["gate"], _group(target, "gate")
    if {target.formats[role] for role in ("gate", "up", "down")} != {form}:
        raise PassFailedError(f"layer {node.layer}: gate, up and down experts differ in format")
    sizes |= {"experts": node.attr("experts"), "top_k": node.attr("top_k")}
    hidden, inner = node.width, node.attr("intermediate")
    into, back = {"k": hidden, "n": inner, "act": 0}, {"k": inner, "n": hidden}
    if phase == PREFILL:
        return [
            _spec("grouped_gate_up", target, into | sizes, form, "bf16"),
            _spec("grouped_down", target, back | sizes, form, "f32"),
        ]
    sizes |= {"tokens": MAX_TOKENS}
    return [
        _spec("experts_gate_up", target, into | sizes, form, "bf16"),
        _spec("experts_down", target, back | sizes, form, "f32"),
    ]


def _rotary(node: NodeMeta, phase: str, target: Target) -> Chosen:
    sizes = {name: node.attr(name) for name in ("heads", "head_dim", "start", "dim", "interleaved")}
    gamma = target.formats.get("gamma", "")
    return [_spec("rotary", target, sizes, gamma)]


def _attention(node: NodeMeta, phase: str, target: Target) -> Chosen:
    sizes = {name: node.attr(name) for name in ("heads", "kv_heads", "head_dim", "v_dim")}
    sizes["block"] = target.kv_block
    append = _spec("kv_append", target, sizes)
    if phase == PREFILL:
        return [append, _spec("attention_prefill", target, sizes, out="bf16")]
    return [
        append,
        _spec("attention", target, sizes, out="bf16"),
        _spec("attention_join", target, sizes, out="bf16"),
    ]


def _mla(node: NodeMeta, phase: str, target: Target) -> Chosen:
    sizes = {name: node.attr(name) for name in ("heads", "nope", "rope", "v_dim", "rank")}
    sizes["block"] = target.kv_block
    append = _spec("mla_append", target, sizes)
    form, group = target.formats["kv_b"], _group(target, "kv_b")
    if phase == PREFILL:
        return [append, _spec("mla_prefill", target, sizes | group, form, "bf16")]
    sizes["tokens"] = MAX_TOKENS
    expand = sizes | group
    return [
        _spec("mla_absorb", target, expand, form),
        append,
        _spec("mla_attention", target, sizes, out="bf16"),
        _spec("mla_attention_join", target, sizes, out="bf16"),
        _spec("mla_up", target, expand, form, "bf16"),
    ]


def _route(node: NodeMeta, phase: str, target: Target) -> Chosen:
    names = ("experts", "top_k", "scoring", "normalise", "groups", "top_groups")
    return [_spec("route", target, {name: node.attr(name) for name in names})]


_TABLE: dict[str, Callable[[NodeMeta, str, Target], Chosen]] = {
    "embedding": _embedding,
    "norm": _norm,
    "add_norm": _add_norm,
    "add": _add,
    "linear": _linear,
    "gate_up": _gate_up,
    "experts": _experts,
    "rotary": _rotary,
    "attention": _attention,
    "mla": _mla,
    "route": _route,
}
