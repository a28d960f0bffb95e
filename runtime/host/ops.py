"""What each step op calls: the literal table `HOST_OPS`, from op to the function that appends its
records.

A step's kernels tell which form runs: `linear` or `gemm`, `experts_*` or `grouped_*`, attention for
few queries or many. Operands and roles are those of the table in hmc/plan/model.py, argument names
those of codegen/spec.py.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from hmc.codegen.kernels.attention.attention import attention_scratch_bytes
from hmc.codegen.kernels.attention.mla import mla_scratch_bytes
from hmc.codegen.kernels.attention.mla_prefill import mla_prefill_scratch_bytes
from hmc.codegen.kernels.attention.prefill_attention import prefill_attention_scratch_bytes
from hmc.codegen.kernels.matmul.experts import scratch_bytes as experts_scratch_bytes
from hmc.codegen.kernels.matmul.gemm import gemm_scratch_bytes
from hmc.codegen.kernels.matmul.grouped import grouped_scratch_bytes
from hmc.codegen.rowwise import INPUTS, VECTORS
from hmc.codegen.spec import KernelSpec
from hmc.plan import Operand, Step
from hmc.ranges import expert_ranges
from hmc.runtime.host.lowering import Call, Lowering, OpFunction


def _embed(low: Lowering, step: Step) -> None:
    ids, y = step.inputs["ids"], step.outputs["y"]
    low.add(
        step,
        low.specs(step)["embed"],
        reads=[ids],
        writes=[y],
        table=low.store.address(step.weights["table"]),
        ids=low.arena.address(ids),
        **_at(low, y=y),
    )


def _gather_rows(low: Lowering, step: Step) -> None:
    low.rows_begin()
    x, rows, y = step.inputs["x"], step.inputs["rows"], step.outputs["y"]
    low.add(
        step,
        low.specs(step)["gather_rows"],
        reads=[x, rows],
        writes=[y],
        rows=low.arena.address(rows),
        **_at(low, x=x, y=y),
    )


def _norm(low: Lowering, step: Step) -> None:
    x, y = step.inputs["x"], step.outputs["y"]
    low.add(
        step,
        low.specs(step)["norm"],
        reads=[x],
        writes=[y],
        gamma=low.store.address(step.weights["gamma"]),
        groups=int(step.attrs["groups"]),
        eps=float(step.attrs["eps"]),
        **_at(low, x=x, y=y),
    )


def _add(low: Lowering, step: Step) -> None:
    h, y = step.inputs["h"], step.outputs["y"]
    low.add(
        step,
        low.specs(step)["add"],
        reads=step.inputs.values(),
        writes=[y],
        **_at(low, h=h, d0=step.inputs["d0"], d1=step.inputs.get("d1"), y=y),
    )


def _add_norm(low: Lowering, step: Step) -> None:
    h, h_out, y = step.inputs["h"], step.outputs["h_out"], step.outputs["y"]
    d0, d1 = step.inputs["d0"], step.inputs.get("d1")
    low.add(
        step,
        low.specs(step)["add_norm"],
        reads=step.inputs.values(),
        writes=[h_out, y],
        gamma=low.store.address(step.weights["gamma"]),
        eps=float(step.attrs["eps"]),
        **_at(low, h=h, d0=d0, d1=d1, h_out=h_out, y=y),
    )


def _pointwise(low: Lowering, step: Step) -> None:
    y, inputs = step.outputs["y"], step.inputs
    low.add(
        step,
        low.specs(step)["pointwise"],
        reads=inputs.values(),
        writes=[y],
        **{name: low.tables.vector(step.weights.get(name)) for name in VECTORS},
        **_at(low, y=y, **{name: inputs.get(name) for name in INPUTS}),
    )


def _linear(low: Lowering, step: Step) -> None:
    x, y = step.inputs["x"], step.outputs["y"]
    ((op, spec),) = low.specs(step).items()
    extra = {}
    if op == "gemm":
        extra = {"gather": 0, "scratch": _private(low, op, gemm_scratch_bytes(spec))}
    low.add(
        step,
        spec,
        reads=[x],
        writes=[y],
        w=low.store.address(step.weights["weight"]),
        scale=low.store.scale_address(step.weights["weight"]),
        bias=low.tables.vector(step.weights.get("bias")),
        rows=int(step.attrs["n"]),
        weight_bytes=step.weight_bytes if op == "linear" else 0,
        weight_rows=int(step.attrs["n"]),
        **_at(low, x=x, y=y),
        **extra,
    )


def _gate_up(low: Lowering, step: Step) -> None:
    x, y = step.inputs["x"], step.outputs["y"]
    gate, up = (step.weights[role] for role in ("gate", "up"))
    places = {
        "gate": low.store.address(gate),
        "gate_scale": low.store.scale_address(gate),
        "up": low.store.address(up),
        "up_scale": low.store.scale_address(up),
    }
    ((op, spec),) = low.specs(step).items()
    if op == "gate_up":
        rows = int(step.attrs["n"])
        low.add(
            step,
            spec,
            reads=[x],
            writes=[y],
            weight_bytes=step.weight_bytes,
            weight_rows=rows,
            rows=rows,
            **places,
            **_at(low, x=x, y=y),
        )
        return
    # The many-token form is that of experts: here one, which all tokens go to.
    assert low.arena.packed(y)
    table = np.array([[*places.values(), 0, 0]], np.int64)
    low.add(
        step,
        spec,
        reads=[x],
        writes=[y],
        slots=int(low.arena.order.ctypes.data),
        offsets=int(low.arena.span.ctypes.data),
        table=low.tables.array(("table", low.phase.name, step.id), table),
        act=low.arena.address(y),
        scratch=_private(low, op, grouped_scratch_bytes(spec)),
        **_at(low, x=x),
    )


def _rotary(low: Lowering, step: Step) -> None:
    x, positions = step.inputs["x"], step.inputs["positions"]
    cos, sin = low.tables.rotary(str(step.attrs["rope"]), float(step.attrs["factor"]))
    gamma = step.weights.get("gamma")
    low.add(
        step,
        low.specs(step)["rotary"],
        reads=[x, positions],
        writes=[x],
        gamma=low.store.address(gamma) if gamma else 0,
        cos=cos,
        sin=sin,
        positions=low.arena.address(positions),
        eps=float(step.attrs["eps"]),
        **_at(low, x=x),
    )


def _attention(low: Lowering, step: Step) -> None:
    q, k, v, positions = (step.inputs[role] for role in ("q", "k", "v", "positions"))
    y, specs, cache = step.outputs["y"], low.specs(step), ("kv", step.layer)
    caches = {f"{name}_cache": low.kv.address(step.layer, name) for name in ("k", "v")}
    paged = _paged(low, positions)
    scale = float(step.attrs["scale"])
    reads = [k, v, positions]
    low.add(
        step,
        specs["kv_append"],
        reads=reads,
        writes=[cache],
        **caches,
        **paged,
        **_at(low, k=k, v=v),
    )
    if spec := specs.get("attention_prefill"):
        low.add(
            step,
            spec,
            reads=[q, positions, cache],
            writes=[y],
            scale=scale,
            scratch=_private(low, spec.op, prefill_attention_scratch_bytes(spec)),
            **caches,
            **paged,
            **_at(low, q=q, y=y),
        )
        return
    spec = specs["attention"]
    size = attention_scratch_bytes(spec, low.arena.max_tokens, low.plan.limits.max_context)
    scratch = low.arena.workspace("attention", size)
    low.add(
        step,
        spec,
        reads=[q, positions, cache],
        writes=["attention"],
        scale=scale,
        scratch=scratch,
        **caches,
        **paged,
        **_at(low, q=q, y=y),
    )
    low.add(
        step,
        specs["attention_join"],
        reads=["attention", positions],
        writes=[y],
        positions=paged["positions"],
        scratch=scratch,
        **_at(low, y=y),
    )


def _mla(low: Lowering, step: Step) -> None:
    q, narrow, k_rope, positions = (
        step.inputs[role] for role in ("q", "latent", "k_rope", "positions")
    )
    y, specs, cache = step.outputs["y"], low.specs(step), ("kv", step.layer)
    paged = _paged(low, positions)
    held = low.kv.address(step.layer, "latent")
    kv_b = step.weights["kv_b"]
    heads, rank, scale = *_ints(step, "heads", "rank"), float(step.attrs["scale"])
    low.add(
        step,
        specs["mla_append"],
        reads=[narrow, k_rope, positions],
        writes=[cache],
        cache=held,
        **paged,
        **_at(low, latent=narrow, k_rope=k_rope),
    )
    w, w_scale = low.store.address(kv_b), low.store.scale_address(kv_b)
    if spec := specs.get("mla_prefill"):
        low.add(
            step,
            spec,
            reads=[q, positions, cache],
            writes=[y],
            cache=held,
            w=w,
            w_scale=w_scale,
            scale=scale,
            scratch=_private(low, spec.op, mla_prefill_scratch_bytes(spec)),
            **paged,
            **_at(low, q=q, y=y),
        )
        return
    tokens = low.arena.max_tokens
    weight = {"w": w, "scale": w_scale}
    inner = low.arena.workspace("q_latent", 4 * tokens * heads * rank)
    outer = low.arena.workspace("y_latent", 2 * tokens * heads * rank)
    low.add(
        step,
        specs["mla_absorb"],
        reads=[q],
        writes=["q_latent"],
        q_latent=inner,
        **weight,
        **_at(low, q=q),
    )
    spec = specs["mla_attention"]
    scratch = low.arena.workspace(
        "mla", mla_scratch_bytes(spec, tokens, low.plan.limits.max_context)
    )
    low.add(
        step,
        spec,
        reads=[q, "q_latent", positions, cache],
        writes=["mla"],
        q_latent=inner,
        cache=held,
        y_latent=outer,
        scale=scale,
        scratch=scratch,
        **paged,
        **_at(low, q=q),
    )
    low.add(
        step,
        specs["mla_attention_join"],
        reads=["mla", positions],
        writes=["y_latent"],
        positions=paged["positions"],
        y_latent=outer,
        scratch=scratch,
    )
    low.add(
        step,
        specs["mla_up"],
        reads=["y_latent"],
        writes=[y],
        y_latent=outer,
        **weight,
        **_at(low, y=y),
    )


def _route(low: Lowering, step: Step) -> None:
    logits, ids, routing = step.inputs["logits"], step.outputs["ids"], step.outputs["routing"]
    assert low.arena.packed(ids) and low.arena.packed(routing)
    low.add(
        step,
        low.specs(step)["route"],
        reads=[logits],
        writes=[ids, routing],
        bias=low.tables.vector(step.weights.get("bias")),
        ids=low.arena.address(ids),
        routing=low.arena.address(routing),
        factor=float(step.attrs["factor"]),
        **_at(low, logits=logits),
    )
    if (recorder := low.routing) is not None:
        experts = int(step.attrs["experts"])

        def count(call: Call) -> None:
            recorder.count(step.layer, experts, low.arena.array(ids, call.tokens))

        low.python(step, count)


def _experts(low: Lowering, step: Step) -> None:
    x, ids, routing = (step.inputs[role] for role in ("x", "ids", "routing"))
    y, specs = step.outputs["y"], low.specs(step)
    assert low.arena.packed(ids) and low.arena.packed(routing)
    tokens, top_k, experts = low.arena.max_tokens, *_ints(step, "top_k", "experts")
    table = low.tables.array(("experts", step.layer), low.store.expert_table(step.layer))
    into = specs.get("experts_gate_up") or specs["grouped_gate_up"]
    act = low.arena.workspace("act", 2 * tokens * top_k * into["n"])
    common = {"table": table, "act": act}
    chosen: Operand | Hashable = ids
    ids_at = low.arena.address(ids)
    if "range" in step.attrs:
        chosen, ids_at = _resident(low, step, into.isa)
    if into.op == "experts_gate_up":
        back = specs["experts_down"]
        scratch = low.arena.workspace("experts", experts_scratch_bytes(back))
        common |= {"ids": ids_at, "scratch": scratch}
        third = step.weight_bytes // 3  # gate, up and down are equally large
        low.add(
            step,
            into,
            reads=[x, chosen],
            writes=["act"],
            weight_bytes=2 * third,
            weight_rows=top_k * into["n"],
            **common,
            **_at(low, x=x),
        )
        low.add(
            step,
            back,
            reads=["act", chosen, routing],
            writes=[y, "experts"],
            weight_bytes=third,
            weight_rows=back["n"],
            routing=low.arena.address(routing),
            **common,
            **_at(low, y=y),
        )
        return
    # Not a choice of the plan's: the form that takes experts one by one needs them in order.
    sort = KernelSpec.of("sort_experts", into.isa, top_k=top_k, experts=experts)
    order = {
        "slots": low.arena.workspace("slots", 4 * tokens * top_k),
        "offsets": low.arena.workspace("offsets", 4 * (experts + 1)),
    }
    low.add(step, sort, reads=[chosen], writes=["order"], ids=ids_at, **order)
    back = specs["grouped_down"]
    common |= order
    low.add(
        step,
        into,
        reads=[x, "order"],
        writes=["act"],
        scratch=_private(low, into.op, grouped_scratch_bytes(into)),
        **common,
        **_at(low, x=x),
    )
    low.add(
        step,
        back,
        reads=["act", "order", routing],
        writes=[y],
        routing=low.arena.address(routing),
        scratch=_private(low, back.op, grouped_scratch_bytes(back)),
        **common,
        **_at(low, y=y),
    )


HOST_OPS: dict[str, OpFunction] = {
    "embed": _embed,
    "gather_rows": _gather_rows,
    "norm": _norm,
    "add": _add,
    "add_norm": _add_norm,
    "pointwise": _pointwise,
    "linear": _linear,
    "gate_up": _gate_up,
    "rotary": _rotary,
    "attention": _attention,
    "mla": _mla,
    "route": _route,
    "experts": _experts,
}


def _at(low: Lowering, **operands: Operand | None) -> dict[str, int]:
    """`name` and `name_stride` arguments of each operand, 0 for those that are absent."""
    result = {}
    for name, operand in operands.items():
        result[name] = 0 if operand is None else low.arena.address(operand)
        result[f"{name}_stride"] = 0 if operand is None else low.arena.stride(operand)
    return result


def _paged(low: Lowering, positions: Operand) -> dict[str, int]:
    """The arguments that find a token's place in the cache."""
    return {
        "tables": int(low.kv.tables.ctypes.data),
        "table_stride": int(low.kv.tables.shape[1]),
        "sequence": int(low.arena.sequence.ctypes.data),
        "positions": low.arena.address(positions),
    }


def _resident(low: Lowering, step: Step, isa: str) -> tuple[str, int]:
    """Append the record that leaves out the experts which a step does not have; name and address
    of the ids it makes."""
    ids, some = step.inputs["ids"], str(step.attrs["range"])
    top_k, experts = _ints(step, "top_k", "experts")
    mask = np.zeros(experts, np.int32)
    mask[expert_ranges(some)] = 1
    out = low.arena.workspace("resident", 4 * low.arena.max_tokens * top_k)
    low.add(
        step,
        KernelSpec.of("resident_ids", isa, top_k=top_k),
        reads=[ids],
        writes=["resident"],
        ids=low.arena.address(ids),
        mask=low.tables.array(("resident", step.layer, some), mask),
        out=out,
    )
    return "resident", out


def _private(low: Lowering, name: str, bytes_per_worker: int) -> int:
    """Scratch of which every worker touches its own part alone."""
    return low.arena.workspace(name, low.workers * bytes_per_worker)


def _ints(step: Step, *names: str) -> tuple[int, ...]:
    return tuple(int(step.attrs[name]) for name in names)
