"""What each step op calls on the CPU: `host_op` gives the function that appends its records.

Most ops need nothing of their own (records.py); the table `HOST_OPS` has those that call several
kernels or need scratch. A step's kernels tell which form runs: `linear` or `gemm`, `experts_*` or
`grouped_*`, attention for few queries or many.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np

from hmc.codegen.expr import has_gate, weighs
from hmc.codegen.formats.weights import row_bytes
from hmc.codegen.kernels.attention.attend import attention_scratch_bytes
from hmc.codegen.kernels.attention.block_index import block_scratch_bytes, block_stride
from hmc.codegen.kernels.attention.index import scores_stride
from hmc.codegen.kernels.attention.prefill_form import prefill_scratch_bytes
from hmc.codegen.kernels.attention.sparse import (
    gathered_bytes,
    gathered_rows,
    sparse_scratch_bytes,
)
from hmc.codegen.kernels.matmul.experts import scratch_bytes as experts_scratch_bytes
from hmc.codegen.kernels.recurrent.linear_form import linear_scratch_bytes
from hmc.codegen.panel.tiling import panel_scratch_bytes
from hmc.codegen.spec import KernelSpec
from hmc.errors import ExecutionError, wrong_table
from hmc.ops import OPS, kept_by
from hmc.plan import Operand, Step
from hmc.ranges import expert_ranges
from hmc.runtime.host.compressed import compressed_attention, index_pools
from hmc.runtime.host.lowering import Lowering, OpFunction
from hmc.runtime.host.records import record
from hmc.runtime.host.screen import screened_linear
from hmc.runtime.weights.store import BIASES


def _plain(low: Lowering, step: Step) -> None:
    """One record of the step's one kernel."""
    if OPS[step.op].picks:
        low.rows_begin()
    (spec,) = low.specs(step).values()
    record(low, step, spec)


def _linear(low: Lowering, step: Step) -> None:
    if "screen" in (specs := low.specs(step)):
        return screened_linear(low, step)
    ((op, spec),) = specs.items()
    weight, rows = step.weights["weight"], int(step.attrs["n"])
    given = {
        "w": low.store.address(weight),
        "scale": low.store.scale_address(weight),
        "rows": rows,
    }
    if op == "gemm":
        given |= {"gather": 0, "scratch": _private(low, op, panel_scratch_bytes(spec))}
        record(low, step, spec, given)
        return
    record(low, step, spec, given, shared=(step.weight_bytes, rows))


def _grouped_linear(low: Lowering, step: Step) -> None:
    """A record of one matrix for each group, on its columns."""
    ((op, spec),) = low.specs(step).items()
    groups, rows = _ints(step, "groups", "n")
    shared = (step.weight_bytes // groups, rows)
    for group in range(groups):
        weight, parts = step.weights[f"weight{group}"], {}
        for role, operand in (("x", step.inputs["x"]), ("y", step.outputs["y"])):
            width = operand.width // groups
            column = operand.column + group * width
            parts[role] = operand.model_copy(update={"column": column, "width": width})
        given = {
            **{role: low.arena.address(part) for role, part in parts.items()},
            "w": low.store.address(weight),
            "scale": low.store.scale_address(weight),
            "bias": 0,
            "rows": rows,
        }
        if op == "gemm":
            given |= {"gather": 0, "scratch": _private(low, op, panel_scratch_bytes(spec))}
        writes = [step.outputs["y"]]
        record(low, step, spec, given, writes=writes, shared=(0, 0) if op == "gemm" else shared)


def _gate_up(low: Lowering, step: Step) -> None:
    places = {}
    for role in ("gate", "up"):
        places[role] = low.store.address(step.weights[role])
        places[f"{role}_scale"] = low.store.scale_address(step.weights[role])
    ((op, spec),) = low.specs(step).items()
    rows, y = int(step.attrs["n"]), step.outputs["y"]
    if op == step.op:
        given = {"rows": rows, **places}
        record(low, step, spec, given, shared=(step.weight_bytes, rows))
        return
    # The many-token form is that of experts: here one, which all tokens go to.
    assert low.arena.packed(y)
    table = np.array([[*places.values(), 0, 0]], np.int64)
    given = {
        "slots": int(low.arena.order.ctypes.data),
        "offsets": int(low.arena.span.ctypes.data),
        "table": low.tables.array(("table", low.phase.name, step.id), table),
        "act": low.arena.address(y),
        "scratch": _private(low, op, panel_scratch_bytes(spec)),
    }
    record(low, step, spec, given)


def _rotary(low: Lowering, step: Step) -> None:
    constant, factor = str(step.attrs["rope"]), float(step.attrs["factor"])
    cos, sin = low.tables.rotary(constant, factor, step.weights.get("alpha"))
    record(low, step, low.specs(step)["rotary"], {"cos": cos, "sin": sin})


def _attention(low: Lowering, step: Step) -> None:
    q, k, v, positions = (step.inputs[role] for role in ("q", "k", "v", "positions"))
    specs, cache = low.specs(step), ("kv", step.layer)
    caches = {f"{name}_cache": low.kv.address(step.layer, name) for name in ("k", "v")}
    record(low, step, specs["kv_append"], caches, reads=[k, v, positions], writes=[cache])
    scores = [q, positions, cache, *filter(None, [step.inputs.get("chosen")])]
    if spec := specs.get("attention_prefill"):
        caches["scratch"] = _private(low, spec.op, prefill_scratch_bytes(spec))
        record(low, step, spec, caches, reads=scores)
        return
    spec = specs["attention"]
    size = attention_scratch_bytes(spec, low.arena.max_tokens, low.plan.limits.max_context)
    caches["scratch"] = low.arena.workspace("attention", size)
    record(low, step, spec, caches, reads=scores, writes=["attention"])
    record(low, step, specs["attention_join"], caches, reads=["attention", positions])


def _index_blocks(low: Lowering, step: Step) -> None:
    q, fresh, positions = (step.inputs[role] for role in ("q", "indexer_k", "positions"))
    specs, cache = low.specs(step), ("indexer", step.layer)
    longest = low.plan.limits.max_context
    stride = block_stride(int(step.attrs["index_block"]), longest)
    given = {"cache": low.kv.address(step.layer, "indexer_k"), "scores_stride": stride}
    record(low, step, specs["index_append"], given, reads=[fresh, positions], writes=[cache])
    reads = [q, positions, cache]
    if spec := specs.get("block_prefill"):
        given["scratch"] = _private(low, spec.op, block_scratch_bytes(spec, longest))
        record(low, step, spec, given, reads=reads)
        return
    rows = low.arena.max_tokens * int(step.attrs["heads"])
    given["scores"] = low.arena.workspace("block_scores", 4 * rows * stride)
    record(low, step, specs["block_scores"], given, reads=reads, writes=["block_scores"])
    made = [step.outputs["chosen"], "block_scores"]
    record(low, step, specs["block_choose"], given, reads=["block_scores", positions], writes=made)


def _mla(low: Lowering, step: Step) -> None:
    specs, (given, cache) = low.specs(step), _latents(low, step)
    if spec := specs.get("mla_prefill"):
        _mla_prefill(low, step, spec, given)
        return
    _absorbed(low, step, given, [cache])


def _latents(low: Lowering, step: Step) -> tuple[dict[str, int], Hashable]:
    """Append new latents, but those that an earlier layer keeps; where all and kv_b are, and how
    records call the cache."""
    layer = kept_by(step.attrs, step.layer)
    cache = ("kv", layer)
    given = {
        "cache": low.kv.address(layer, "latent"),
        "w": low.store.address(step.weights["kv_b"]),
        "w_scale": low.store.scale_address(step.weights["kv_b"]),
    }
    if append := low.specs(step).get("mla_append"):
        roles = (role for role in ("latent", "k_rope", "positions") if role in step.inputs)
        fresh = [step.inputs[role] for role in roles]
        record(low, step, append, given, reads=fresh, writes=[cache])
    return given, cache


def _mla_prefill(low: Lowering, step: Step, spec: KernelSpec, given: dict[str, int]) -> None:
    given = given | {"scratch": _private(low, spec.op, prefill_scratch_bytes(spec))}
    reads = [step.inputs["q"], step.inputs["positions"], ("kv", kept_by(step.attrs, step.layer))]
    record(low, step, spec, given, reads=reads)


def _absorbed(
    low: Lowering, step: Step, given: dict[str, int], cache: list[Hashable], longest: int = 0
) -> None:
    """Latent attention of few queries to what `cache` says is read, of up to `longest` positions
    (0: as many as a sequence has)."""
    q, positions = step.inputs["q"], step.inputs["positions"]
    specs, (heads, rank) = low.specs(step), _ints(step, "heads", "rank")
    tokens, longest = low.arena.max_tokens, longest or low.plan.limits.max_context
    scales = {"scale": given["w_scale"]}
    given = given | {
        "q_latent": low.arena.workspace("q_latent", 4 * tokens * heads * rank),
        "y_latent": low.arena.workspace("y_latent", 2 * tokens * heads * rank),
    }
    record(low, step, specs["mla_absorb"], given | scales, reads=[q], writes=["q_latent"])
    spec = specs["mla_attention"]
    size = attention_scratch_bytes(spec, tokens, longest)
    given["scratch"] = low.arena.workspace("mla", size)
    record(low, step, spec, given, reads=[q, positions, "q_latent", *cache], writes=["mla"])
    join, reads = specs["mla_attention_join"], ["mla", positions, *cache]
    record(low, step, join, given, reads=reads, writes=["y_latent"])
    record(low, step, specs["mla_up"], given | scales, reads=["y_latent"])


def _recurrent(low: Lowering, step: Step, state: str, given: Mapping[str, int]) -> None:
    """One record of the step's one kernel, which works in place on a state a sequence."""
    held = ("state", step.layer, state)
    (spec,) = low.specs(step).values()
    given = {"state": low.kv.address(step.layer, state), **given}
    reads, writes = ([*each.values(), held] for each in (step.inputs, step.outputs))
    record(low, step, spec, given, reads=reads, writes=writes)


def _linear_attention(low: Lowering, step: Step) -> None:
    ((op, spec),) = low.specs(step).items()
    scratch = {} if op == step.op else {"scratch": _private(low, op, linear_scratch_bytes(spec))}
    _recurrent(low, step, "recurrent", scratch)


def _conv(low: Lowering, step: Step) -> None:
    (width,) = _ints(step, "width")
    taps = low.tables.by_column(step.weights["weight"], width)
    _recurrent(low, step, str(step.attrs["state"]), {"weight": taps})


def _selective_scan(low: Lowering, step: Step) -> None:
    (width,) = _ints(step, "width")
    change = (lambda found: -np.exp(found)) if step.attrs["log"] else (lambda found: found)
    rate = low.tables.by_column(step.weights["a"], width, change)
    _recurrent(low, step, "scan", {"rate": rate})


def _index(low: Lowering, step: Step) -> None:
    q, fresh, weights, positions = (
        step.inputs[role] for role in ("q", "indexer_k", "weights", "positions")
    )
    specs, cache = low.specs(step), ("indexer", step.layer)
    stride = scores_stride(low.kv.block, low.plan.limits.max_context)
    given = {"cache": low.kv.address(step.layer, "indexer_k"), "scores_stride": stride}
    record(low, step, specs["index_append"], given, reads=[fresh, positions], writes=[cache])
    reads = [q, weights, positions, cache]
    if spec := specs.get("index_prefill"):
        given["scratch"] = _private(low, spec.op, 4 * stride)
        record(low, step, spec, given, reads=reads)
        return
    given["scores"] = low.arena.workspace("scores", 4 * low.arena.max_tokens * stride)
    record(low, step, specs["index_scores"], given, reads=reads, writes=["scores"])
    made = [step.outputs["chosen"], "scores"]
    record(low, step, specs["index_choose"], given, reads=["scores", positions], writes=made)


def _sparse_mla(low: Lowering, step: Step) -> None:
    chosen, positions = step.inputs["chosen"], step.inputs["positions"]
    specs, (given, cache) = low.specs(step), _latents(low, step)
    if spec := specs.get("sparse_mla_prefill"):
        _mla_prefill(low, step, specs["mla_prefill"], given)
        given["scratch"] = _private(low, spec.op, sparse_scratch_bytes(spec))
        record(low, step, spec, given, reads=[step.inputs["q"], chosen, positions, cache])
        return
    spec, tokens = specs["mla_gather"], low.arena.max_tokens
    pages = gathered_rows(spec) // spec["block"]
    table = np.arange(tokens * pages, dtype=np.int32)
    given["gathered"] = low.arena.workspace("gathered", tokens * gathered_bytes(spec))
    given["lasts"] = low.arena.workspace("lasts", 4 * tokens)
    reads, made = [chosen, positions, cache], ["gathered", "lasts"]
    record(low, step, spec, given, reads=reads, writes=made)
    # each token's rows are read as a cache of its own
    given |= {"cache": given["gathered"], "positions": given["lasts"], "table_stride": pages}
    given["tables"] = low.tables.array(("gathered", tokens, pages), table)
    given["sequence"] = int(low.arena.order.ctypes.data)
    _absorbed(low, step, given, ["gathered", "lasts"], spec["index_topk"])


def _route(low: Lowering, step: Step) -> None:
    _routed(low, step, {})


def _routed(low: Lowering, step: Step, given: Mapping[str, int]) -> None:
    ids = step.outputs["ids"]
    assert low.arena.packed(ids) and low.arena.packed(step.outputs["routing"])
    (spec,) = low.specs(step).values()
    record(low, step, spec, given)
    if (recorder := low.routing) is not None:
        experts = int(step.attrs["experts"])

        def count(tokens: int) -> None:
            recorder.count(step.layer, experts, low.arena.array(ids, tokens))

        low.python(step, count)


def _hash_route(low: Lowering, step: Step) -> None:
    name, (experts, vocab) = step.weights["table"], _ints(step, "experts", "vocab")
    table = low.store.rows(name, 0, vocab)
    if table.min() < 0 or table.max() >= experts or (table % 1).any():
        raise ExecutionError(wrong_table(name, experts))
    place = low.tables.array(("hash_route", step.layer), table.astype(np.int32))
    _routed(low, step, {"table": place})


def _experts(low: Lowering, step: Step) -> None:
    x, ids, routing = (step.inputs[role] for role in ("x", "ids", "routing"))
    y, specs = step.outputs["y"], low.specs(step)
    assert low.arena.packed(ids) and low.arena.packed(routing)
    tokens, top_k, experts = low.arena.max_tokens, *_ints(step, "top_k", "experts")
    into, back = specs.values()
    common = {
        "table": low.tables.array(("experts", step.layer), low.store.expert_table(step.layer)),
        "act": low.arena.workspace("act", 2 * tokens * top_k * into["n"]),
        "ids": low.arena.address(ids),
    }
    chosen: Operand | Hashable = ids
    biases = [low.tables.expert_vectors(step.layer, role) for role in BIASES]
    first_half = {"routing": low.arena.address(routing), "gate_bias": biases[0],
                  "up_bias": biases[1], "teams": low.team_table}  # fmt: skip
    second_half = {"bias": biases[2]}
    if weighed := weighs(str(step.attrs["act"])):
        second_half["routing"] = low.tables.ones(tokens * top_k)
    if "range" in step.attrs:
        chosen, common["ids"] = _resident(low, step, into.isa)
    if into.op == "experts_gate_up":
        common["scratch"] = low.arena.workspace("experts", experts_scratch_bytes(back))
        up = int(step.weight_bytes * _up_share(into, back, 1 + has_gate(str(step.attrs["act"]))))
        first, second = (up, top_k * into["n"]), (step.weight_bytes - up, back["n"])
        reads: list[Operand | Hashable] = [x, chosen, *([routing] if weighed else [])]
        record(low, step, into, common | first_half, reads=reads, writes=["act"], shared=first)
        reads, writes = ["act", chosen, routing], [y, "experts"]
        record(low, step, back, common | second_half, reads=reads, writes=writes, shared=second)
        return
    # Not a choice of the plan's: the form that takes experts one by one needs them in order.
    sort = KernelSpec.of("sort_experts", into.isa, top_k=top_k, experts=experts)
    common["slots"] = low.arena.workspace("slots", 4 * tokens * top_k)
    common["offsets"] = low.arena.workspace("offsets", 4 * (experts + 1))
    record(low, step, sort, common, reads=[chosen], writes=["order"])
    common["scratch"] = _private(low, into.op, panel_scratch_bytes(into))
    reads = [x, "order", *([routing] if weighed else [])]
    record(low, step, into, common | first_half, reads=reads, writes=["act"])
    common["scratch"] = _private(low, back.op, panel_scratch_bytes(back))
    record(low, step, back, common | second_half, reads=["act", "order", routing])


def _up_share(into: KernelSpec, back: KernelSpec, matrices: int) -> float:
    """Of the bytes of experts those of gate and up, or of up alone."""
    up, down = (spec["n"] * row_bytes(spec.weight, spec["k"]) for spec in (into, back))
    return matrices * up / (matrices * up + down)


HOST_OPS: dict[str, OpFunction] = {
    "linear": _linear,
    "grouped_linear": _grouped_linear,
    "gate_up": _gate_up,
    "rotary": _rotary,
    "attention": _attention,
    "index_blocks": _index_blocks,
    "sparse_attention": _attention,
    "mla": _mla,
    "linear_attention": _linear_attention,
    "conv": _conv,
    "selective_scan": _selective_scan,
    "index": _index,
    "index_pools": index_pools,
    "sparse_mla": _sparse_mla,
    "compressed_attention": compressed_attention,
    "route": _route,
    "hash_route": _hash_route,
    "experts": _experts,
}


def host_op(name: str) -> OpFunction:
    """What appends the records of an op: one of its own, or the one that goes by names."""
    return HOST_OPS.get(name, _plain)


def _resident(low: Lowering, step: Step, isa: str) -> tuple[str, int]:
    """Append the record that leaves out the experts which a step does not have; name and address
    of the ids it makes."""
    some = str(step.attrs["range"])
    top_k, experts = _ints(step, "top_k", "experts")
    mask = np.zeros(experts, np.int32)
    mask[expert_ranges(some)] = 1
    out = low.arena.workspace("resident", 4 * low.arena.max_tokens * top_k)
    given = {"mask": low.tables.array(("resident", step.layer, some), mask), "out": out}
    spec = KernelSpec.of("resident_ids", isa, top_k=top_k)
    record(low, step, spec, given, reads=[step.inputs["ids"]], writes=["resident"])
    return "resident", out


def _private(low: Lowering, name: str, bytes_per_worker: int) -> int:
    """Scratch of which every worker touches its own part alone."""
    return low.arena.workspace(name, low.workers * bytes_per_worker)


def _ints(step: Step, *names: str) -> tuple[int, ...]:
    return tuple(int(step.attrs[name]) for name in names)
