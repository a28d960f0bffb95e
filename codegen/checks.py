"""Whether there is a kernel for a spec, answered where specs are chosen, long before one is built;
hides what the emitters cannot do.

Emitters check nothing: they build every spec that passes here. Tile choices are measured, not
chosen by anybody else, and are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from hmc.codegen.arguments import ARGS
from hmc.codegen.expr import ROUTED, activation, elementwise
from hmc.codegen.isa import TIERS
from hmc.codegen.native import problem_of
from hmc.codegen.rowwise import Rowwise
from hmc.codegen.spec import MAX_TAPS, MAX_TOKENS, KernelSpec
from hmc.errors import KernelError
from hmc.formats import FORMATS

_ATTENTION = "heads kv_heads head_dim v_dim block"
_INDEX = "heads dim block index_block index_topk index_local"
_LATENT = "heads nope v_dim rank block"
_RECURRENT = "heads key_heads key_dim value_dim"
_SIZES: dict[str, str] = {
    **dict.fromkeys(("embed", "gather_rows", "norm", "add_norm", "add"), "width"),
    "pointwise": "width groups",
    "rotary": "heads head_dim dim",
    "position_scale": "heads head_dim",
    "conv": "width taps",
    "selective_scan": "width states",
    **dict.fromkeys(("linear", "screen", "screen_tops", "screen_rows"), "k tokens"),
    "screen_copy": "k group",
    "gate_up": "k tokens",
    "gemm": "k",
    **dict.fromkeys(("experts_gate_up", "experts_down"), "k n top_k experts tokens"),
    **dict.fromkeys(("grouped_gate_up", "grouped_down"), "k n top_k experts"),
    **dict.fromkeys(("kv_append", "attention", "attention_join", "attention_prefill"), _ATTENTION),
    **dict.fromkeys(("mla_append", "mla_attention", "mla_attention_join", "mla_prefill"), _LATENT),
    **dict.fromkeys(("mla_absorb", "mla_up"), f"{_LATENT} tokens"),
    **dict.fromkeys(("linear_attention", "linear_attention_prefill"), _RECURRENT),
    **dict.fromkeys(
        ("index_scores", "index_choose", "index_prefill"),
        "heads dim block index_topk",
    ),
    "mla_gather": f"{_LATENT} index_topk",
    "sparse_mla_prefill": f"{_LATENT} tokens index_topk",
    "index_append": "dim block",
    "pool_positions": "index_topk pool",
    **dict.fromkeys(("block_scores", "block_choose", "block_prefill"), _INDEX),
    "route": "experts top_k",
    "hash_route": "experts top_k",
    "hyper_weights": "streams parts",
    **dict.fromkeys(("hyper_in", "hyper_copy"), "width streams"),
    "hyper_out": "width streams parts",
    **dict.fromkeys(("window_append", "window_gather"), "head_dim window"),
    **dict.fromkeys(("compress", "compress_rows"), "width ratio block"),
    **dict.fromkeys(("attend_few", "attend_prefill"), "heads head_dim window block"),
    "sort_experts": "top_k experts",
    "resident_ids": "top_k",
    "stream_read": "streams",
}
"""Sizes that an op needs, all at least 1."""

_EVEN = {
    **dict.fromkeys(("attention", "attention_join"), "head_dim block"),
    "attention_prefill": "head_dim",
    **dict.fromkeys(
        ("mla_attention", "mla_attention_join", "sparse_mla_prefill"), "rank rope block"
    ),
    **dict.fromkeys(("index_scores", "index_prefill"), "dim"),
    **dict.fromkeys(("block_scores", "block_choose"), "index_block"),
    "block_prefill": "dim index_block",
}

_RESULTS = frozenset({"bf16", "f32"})
_MATMULS = frozenset(
    "linear screen screen_rows gate_up gemm experts_gate_up experts_down grouped_gate_up"
    " grouped_down mla_absorb mla_up mla_prefill sparse_mla_prefill".split()
)
_VECTORS = frozenset({"norm", "add_norm", "rotary"})
"""Ops that read a plain row of numbers."""


def _formats(op: str) -> list[str]:
    """Formats that an op reads; "" for none at all."""
    if op in _MATMULS:
        return list(FORMATS)
    alone = [row for row in FORMATS.values() if not row.scales]
    if op == "embed":
        return [row.name for row in alone]
    plain = [row.name for row in alone if not row.values and not row.codes.block[1]]
    if op == "screen_copy":
        return plain
    return ([""] if op not in _VECTORS - {"rotary"} else []) + (plain if op in _VECTORS else [])


def check_spec(spec: KernelSpec) -> None:
    """Raise `KernelError`, one line, where no emitter can build `spec`."""
    if spec.op not in ARGS:
        raise KernelError(f"no kernel is called {spec.op}")
    if spec.isa not in TIERS:
        raise KernelError(f"kernel {spec.op}: no tier {spec.isa}; choose {', '.join(TIERS)}")
    formats = _formats(spec.op)
    if spec.weight not in formats:
        names = ", ".join(sorted(filter(None, formats))) or "none"
        raise _error(spec, f"operand format {spec.weight!r}: choose {names}")
    if spec.out not in _RESULTS:
        raise _error(spec, f"result format {spec.out!r}: choose bf16 or f32")
    for name in _SIZES.get(spec.op, "").split():
        if spec.get(name) < 1:
            raise _error(spec, f"needs a size {name} of at least 1")
    if _SIZES.get(spec.op, "").startswith(_LATENT) and spec.get("rope", -1) < 0:
        raise _error(spec, "needs a size rope of at least 0")
    if spec.get("tokens") > MAX_TOKENS:
        raise _error(spec, f"takes up to {MAX_TOKENS} tokens, not {spec['tokens']}")
    if spec.expr and spec.op not in _EXPRESSIONS:
        raise _error(spec, f"computes no expression such as {spec.expr!r}")
    if spec.op in _MATMULS and (problem := problem_of(spec)):
        raise _error(spec, problem)
    if rule := _RULES.get(spec.op):
        rule(spec)


def _error(spec: KernelSpec, what: str) -> KernelError:
    return KernelError(f"kernel {spec.op} {what}")


def _check_attention(spec: KernelSpec) -> None:
    if spec["heads"] % spec["kv_heads"]:
        raise _error(spec, f"cannot share {spec['kv_heads']} key heads by {spec['heads']} heads")
    _check_even(spec)
    if spec.get("window") and spec.get("chunk"):
        raise _error(spec, "has either a window or chunks")
    for name in ("window", "chunk", "growth_every", "growth_from"):
        if spec.get(name) < 0:
            raise _error(spec, f"has no {name} of {spec[name]}")
    if spec.get("index_block"):
        _check_chosen(spec)
    if spec.expr:
        elementwise(spec.expr, "score")


def _check_chosen(spec: KernelSpec) -> None:
    if spec["index_block"] % 2 or spec["index_block"] < 2:
        raise _error(spec, f"needs an even index_block, not {spec['index_block']}")
    if spec["index_heads"] < 1 or spec["kv_heads"] % spec["index_heads"]:
        raise _error(spec, f"cannot share what {spec['index_heads']} heads chose")
    if spec.get("window") or spec.get("chunk"):
        raise _error(spec, "has either blocks that are chosen or bounds")


def _check_even(spec: KernelSpec) -> None:
    for name in _EVEN[spec.op].split():
        if spec[name] % 2:
            raise _error(spec, f"needs {name} even, not {spec[name]}")


def _check_expanded(spec: KernelSpec) -> None:
    if (spec["nope"] + spec["rope"]) % 2:
        raise _error(spec, f"needs nope + rope even, not {spec['nope']} + {spec['rope']}")


def _check_recurrent(spec: KernelSpec) -> None:
    if spec["heads"] % spec["key_heads"]:
        raise _error(spec, f"cannot share {spec['key_heads']} key heads by {spec['heads']} heads")
    for name, unset in (("channels", -1), ("delta", -1), ("tiled", 0)):
        if spec.get(name, unset) not in (0, 1):
            raise _error(spec, f"needs {name} 0 or 1")


def _check_rotary(spec: KernelSpec) -> None:
    start, dim, width = spec.get("start"), spec["dim"], spec["head_dim"]
    if dim % 2 or start < 0 or start + dim > width:
        raise _error(spec, f"cannot turn {dim} of {width} elements from {start} on")


def _check_route(spec: KernelSpec) -> None:
    experts, top_k, candidates = spec["experts"], spec["top_k"], spec["experts"]
    groups, top_groups = spec.get("groups"), spec.get("top_groups")
    if not 0 <= spec.get("scoring") <= 5:
        raise _error(spec, f"has no scoring {spec['scoring']}")
    if top_groups:
        if groups < 1 or experts % groups or experts < 2 * groups:
            raise _error(spec, f"cannot divide {experts} experts into {groups} groups")
        if spec.get("group_best", 2) not in (1, 2):
            raise _error(spec, f"cannot rank groups by {spec['group_best']} experts")
        candidates = experts // groups * min(groups, top_groups)
    if top_k > candidates:
        raise _error(spec, f"cannot choose top_k {top_k} of {candidates} candidates")


def _check_copy(spec: KernelSpec) -> None:
    if spec["k"] % spec["group"] or spec["group"] % spec.tier.lanes:
        raise _error(spec, f"copies no {spec['k']} columns in groups of {spec['group']}")


def _check_conv(spec: KernelSpec) -> None:
    elementwise(spec.expr, "x")
    if not 2 <= spec["taps"] <= MAX_TAPS:
        raise _error(spec, f"takes 2 to {MAX_TAPS} taps, not {spec['taps']}")


_GATED = ("gate_up", "experts_gate_up", "grouped_gate_up")
_EXPRESSIONS = frozenset({"pointwise", "conv", "attention", "attention_prefill", *_GATED})
_RULES: dict[str, Callable[[KernelSpec], object]] = {
    "screen_copy": _check_copy,
    **dict.fromkeys(("attention", "attention_join", "attention_prefill"), _check_attention),
    **dict.fromkeys(("mla_attention", "mla_attention_join", "sparse_mla_prefill"), _check_even),
    **dict.fromkeys(("index_scores", "index_prefill"), _check_even),
    **dict.fromkeys(("block_scores", "block_choose", "block_prefill"), _check_even),
    "mla_prefill": _check_expanded,
    **dict.fromkeys(("linear_attention", "linear_attention_prefill"), _check_recurrent),
    "rotary": _check_rotary,
    "conv": _check_conv,
    "route": _check_route,
    "pointwise": Rowwise.of,
    "gate_up": lambda spec: activation(spec.expr),
    **dict.fromkeys(_GATED[1:], lambda spec: activation(spec.expr, ROUTED)),
}
