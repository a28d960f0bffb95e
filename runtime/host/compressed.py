"""The records of attention over a window and compressed rows: the window's rows, compressed rows
(and the indexer's), which of them are seen, and attention over all. And those of an indexer that
chooses pools, whose keys are compressed rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import pairwise

from hmc.codegen.kernels.attention.index import scores_stride
from hmc.codegen.kernels.compressed.attend import attend_scratch_bytes, most_rows
from hmc.codegen.spec import KernelSpec
from hmc.plan import Operand, Step
from hmc.runtime.host.lowering import Lowering
from hmc.runtime.host.records import record

_ROWS = {"rows": ("rows_kv", "rows_gate", ""), "index_rows": ("index_kv", "index_gate", "index_")}
"""Of each kind of compressed rows the operands that they are made of, and what the names of their
weights begin with."""


def compressed_attention(low: Lowering, step: Step) -> None:
    """Records of `compressed_attention`."""
    specs = [low.plan.kernels[key] for key in step.kernels]
    keys, given = _window(low, step, specs.pop(0))
    reads: list[Operand | Hashable] = [step.inputs["q"], step.inputs["positions"], keys]
    made = [spec for spec in specs if spec.op.startswith("compress")]
    pairs = list(pairwise(made))[::2]
    for name, pair in zip(_ROWS, pairs, strict=False):
        kv, gate, stem = _ROWS[name]
        cos, sin = low.tables.rotary(str(step.attrs["rope"]), 1.0)
        gamma = low.tables.vector(step.weights[f"{stem}gamma"])
        turned = {"gamma": gamma, "cos": cos, "sin": sin}
        _compress(low, step, name, (kv, gate, f"{stem}ape"), pair, turned)
    if "ratio" in step.attrs:
        given["rows"] = low.kv.address(step.layer, "rows")
        reads.append(("rows", step.layer))
    index = [spec for spec in specs if spec.op.startswith("index")]
    if index:
        ratio = int(step.attrs["ratio"])
        given["chosen"] = _choose(
            low, step, index, "index_rows", ("index_q", "index_weights"), ratio
        )
        reads.append("chosen")
    spec, context = specs[-1], low.plan.limits.max_context
    given["most"] = most_rows(spec, context)
    size = low.workers * attend_scratch_bytes(spec, context)
    given["scratch"] = low.arena.workspace(spec.op, size)
    record(low, step, spec, given, reads=reads)


def _window(low: Lowering, step: Step, spec: KernelSpec) -> tuple[Hashable, dict[str, int]]:
    """Append the record of the window's rows; by what name they are known, and where keys are."""
    dim, window = spec["head_dim"], spec["window"]
    address = low.kv.address(step.layer, "window")
    given = {"window": address, "window_stride": window * dim}
    keys, writes = address, list[Hashable]([("window", step.layer)])
    if spec.op == "window_gather":
        keys = low.arena.workspace("window gathered", 2 * dim * (window + low.arena.max_tokens))
        given["gathered"] = keys
        writes.append("window gathered")
    reads = [step.inputs["kv"], step.inputs["positions"]]
    record(low, step, spec, given, reads=reads, writes=writes)
    return writes[-1], {"keys": keys, "keys_stride": window * dim, "rows": 0, "chosen": 0}


def index_pools(low: Lowering, step: Step) -> None:
    """Records of `index_pools`: keys of pools, the best ones, and what positions these are."""
    specs = [low.plan.kernels[key] for key in step.kernels]
    plain = dict.fromkeys(("gamma", "cos", "sin", "eps"), 0)
    _compress(low, step, "pools", ("k", "gate", "ape"), (specs[0], specs[1]), plain)
    pool, last = int(step.attrs["pool"]), specs[-1]
    given = {
        "pools": _choose(low, step, specs[2:-1], "pools", ("q", "weights"), pool),
        "pools_stride": last["index_topk"] // pool,
    }
    record(low, step, last, given, reads=["chosen", step.inputs["positions"]])


def _compress(
    low: Lowering,
    step: Step,
    name: str,
    roles: tuple[str, str, str],
    specs: tuple[KernelSpec, KernelSpec],
    turned: Mapping[str, int],
) -> None:
    """Append the two records that make compressed rows of what `roles` name: values, gates, and
    what is added to these; `turned` are arguments that say how rows are normed and turned.
    """
    (kv, gate, ape), (mean, rows) = roles, specs
    pooled = low.arena.workspace(f"pooled {name}", 4 * mean["width"] * low.arena.max_tokens)
    state = low.plan.kv.state(step.layer, f"{name}_open")
    given = {
        "kv": low.arena.address(step.inputs[kv]),
        "kv_stride": low.arena.stride(step.inputs[kv]),
        "gate": low.arena.address(step.inputs[gate]),
        "gate_stride": low.arena.stride(step.inputs[gate]),
        "ape": low.tables.vector(step.weights[ape]),
        "state": low.kv.address(step.layer, state.name),
        "state_stride": state.width,
        "rows": low.kv.address(step.layer, name),
        "pooled": pooled,
        "lasts": _lasts(low),
        **turned,
    }
    positions, kept = step.inputs["positions"], (state.name, step.layer)
    reads = [step.inputs[kv], step.inputs[gate], positions, kept]
    record(low, step, mean, given, reads=reads, writes=[kept, f"pooled {name}"])
    ended = [f"pooled {name}", positions]
    record(
        low, step, rows, given, reads=ended, writes=[(name, step.layer), f"pooled {name}", "lasts"]
    )


def _choose(
    low: Lowering,
    step: Step,
    specs: list[KernelSpec],
    rows: str,
    roles: tuple[str, str],
    ratio: int,
) -> int:
    """Append the records that choose `rows`, of `ratio` tokens each, by queries and weights of
    heads, which `roles` name: positions of a cache of rows; where they list them.
    """
    tokens, spec = low.arena.max_tokens, specs[0]
    most = low.plan.limits.max_context // ratio
    stride = scores_stride(spec["block"], most)
    q, weights = (step.inputs[role] for role in roles)
    given = {
        "q": low.arena.address(q),
        "q_stride": low.arena.stride(q),
        "weights": low.arena.address(weights),
        "weights_stride": low.arena.stride(weights),
        "cache": low.kv.address(step.layer, rows),
        "positions": _lasts(low),
        "scores_stride": stride,
        "chosen": low.arena.workspace("chosen", 4 * tokens * spec["index_topk"]),
        "chosen_stride": spec["index_topk"],
    }
    reads: list[Operand | Hashable] = [q, weights, "lasts", (rows, step.layer)]
    if spec.op == "index_prefill":
        given["scratch"] = low.arena.workspace("row scores", 4 * stride * low.workers)
        record(low, step, spec, given, reads=reads, writes=["chosen"])
        return given["chosen"]
    given["scores"] = low.arena.workspace("row scores", 4 * stride * tokens)
    record(low, step, spec, given, reads=reads, writes=["row scores"])
    ranked = ["row scores", "lasts"]
    record(low, step, specs[1], given, reads=ranked, writes=["chosen", "row scores"])
    return given["chosen"]


def _lasts(low: Lowering) -> int:
    """Where the last row that each token sees is noted."""
    return low.arena.workspace("lasts of rows", 4 * low.arena.max_tokens)
