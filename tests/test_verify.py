"""The rules of `verify_plan`, each by a plan that breaks it, and what the rows say of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hmc
from hmc.errors import VerifyError
from hmc.ops import OPS
from hmc.ops.__main__ import lines
from hmc.plan import KVLayout, Operand, Phase, Plan, Step, StoredPlane, Weight
from hmc.plan.order import check_order
from hmc.plan.stored import expected_bytes
from hmc.plan.verify import verify_plan


@pytest.fixture(scope="module")
def plan(checkpoint: Callable[..., Path]) -> Plan:
    return hmc.compile(checkpoint("deepseek_v3", "fp8"))


def _with_phase(plan: Plan, change: Callable[[Phase], dict[str, Any]]) -> Plan:
    decode = plan.phase("decode")
    others = tuple(phase for phase in plan.phases if phase is not decode)
    return plan.model_copy(update={"phases": (*others, decode.model_copy(update=change(decode)))})


def _with_step(plan: Plan, op: str, change: Callable[[Step], dict[str, Any]]) -> Plan:
    """The plan with the first step of an op in decode changed."""

    def changed(phase: Phase) -> dict[str, Any]:
        steps = list(phase.steps)
        at = next(at for at, step in enumerate(steps) if step.op == op)
        steps[at] = steps[at].model_copy(update=change(steps[at]))
        return {"steps": tuple(steps)}

    return _with_phase(plan, changed)


def _with_weight(plan: Plan, name: str, **changes: Any) -> Plan:
    weights = tuple(
        each.model_copy(update=changes) if each.name.endswith(name) else each
        for each in plan.weights
    )
    assert weights != plan.weights
    return plan.model_copy(update={"weights": weights})


def _with_plane(plan: Plan, name: str, **changes: Any) -> Plan:
    """With another first plane of a weight."""
    (weight,) = (each for each in plan.weights if each.name.endswith(name))
    plane = weight.planes[0].model_copy(update=changes)
    return _with_weight(plan, name, planes=(plane, *weight.planes[1:]))


def _attrs(**changes: Any) -> Callable[[Step], dict[str, Any]]:
    return lambda step: {"attrs": {**step.attrs, **changes}}


def _input(role: str, **changes: Any) -> Callable[[Step], dict[str, Any]]:
    def change(step: Step) -> dict[str, Any]:
        operand = step.inputs[role].model_copy(update=changes)
        return {"inputs": {**step.inputs, role: operand}}

    return change


def _without(field: str, name: str) -> Callable[[Step], dict[str, Any]]:
    return lambda step: {field: {k: v for k, v in getattr(step, field).items() if k != name}}


def _with_kernel(plan: Plan, op: str, **changes: Any) -> Plan:
    kernels = {
        key: replace(each, **changes) if each.op == op else each
        for key, each in plan.kernels.items()
    }
    return plan.model_copy(update={"kernels": kernels})


def _narrow(kv: KVLayout) -> KVLayout:
    """The layout with another width of its first state."""
    group = kv.groups[0]
    state = replace(group.states[0], width=8)
    narrow = group.model_copy(update={"states": (state, *group.states[1:])})
    return kv.model_copy(update={"groups": (narrow, *kv.groups[1:])})


BROKEN: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "a kernel of another format": (
        lambda p: _with_step(p, "linear", lambda s: {"kernels": ("linear-bf16-k192-tokens16",)}),
        "is not in the plan|is not linear of fp8",
    ),
    "kernels of another tier": (lambda p: p.model_copy(update={"isa": "avx2"}), "for avx2"),
    "a kernel for fewer tokens": (
        lambda p: _with_kernel(p, "linear", params=(("k", 192), ("tokens", 8))),
        "is not linear of",
    ),
    "a tile that no emitter takes": (
        lambda p: _with_kernel(p, "linear", tile=(("rows", 3),)),
        "no tile choice rows=3",
    ),
    "PyTorch on the host": (
        lambda p: _with_step(p, "add_norm", lambda s: {"kernels": ("torch:add_norm",)}),
        "is not in the plan",
    ),
    "another weight": (
        lambda p: _with_step(
            p, "linear", lambda s: {"weights": {"weight": "model.embed_tokens.weight"}}
        ),
        r"is \[503, 192\], not",
    ),
    "another layer's weight": (
        lambda p: _with_step(
            p,
            "linear",
            lambda s: {"weights": {"weight": s.weights["weight"].replace("layers.0", "layers.1")}},
        ),
        "compute different models",
    ),
    "a weight of more bytes than its shape": (
        lambda p: _with_plane(p, "lm_head.weight", bytes=p.weights[0].bytes + 2),
        r"takes \d+ bytes",
    ),
    "a weight in another format": (
        lambda p: _with_weight(p, "lm_head.weight", format="fp8"),
        "planes codes are not those of fp8",
    ),
    "a weight in another dtype": (
        lambda p: _with_plane(p, "lm_head.weight", dtype="F16"),
        "bf16 codes in F16",
    ),
    "a weight without a role": (
        lambda p: _with_step(p, "norm", lambda s: {"weights": {**s.weights, "beta": "x"}}),
        "weights beside gamma",
    ),
    "a tensor outside its shard": (
        lambda p: _with_plane(p, "lm_head.weight", offset=1 << 40),
        "lies outside its shard",
    ),
    "a tensor before its shard": (
        lambda p: _with_plane(p, "lm_head.weight", offset=-8),
        "lies outside its shard",
    ),
    "a tensor over another": (
        lambda p: _with_plane(p, "lm_head.weight", offset=p.weights[0].planes[0].offset),
        "share bytes",
    ),
    "n = 2^30": (lambda p: _with_step(p, "linear", _attrs(n=1 << 30)), r"y is \d+ wide, not"),
    "a negative attribute": (lambda p: _with_step(p, "linear", _attrs(n=-1)), "attribute n is -1"),
    "an unknown attribute": (lambda p: _with_step(p, "add", _attrs(window=4)), "unknown attribute"),
    "a missing attribute": (
        lambda p: _with_step(p, "norm", _without("attrs", "eps")),
        "it has no attribute eps",
    ),
    "an attribute of another type": (
        lambda p: _with_step(p, "norm", _attrs(eps=1)),
        "attribute eps is 1, no float",
    ),
    "a norm written in another dtype": (
        lambda p: _with_step(p, "norm", _attrs(out="f32")),
        "y is bf16, not f32",
    ),
    "a slice beyond the head": (
        lambda p: _with_step(p, "rotary", _attrs(start=1 << 20)),
        "fit no kernel",
    ),
    "an unknown op": (lambda p: _with_step(p, "add", lambda s: {"op": "plus"}), "unknown op"),
    "a linear without inputs": (
        lambda p: _with_step(p, "linear", _without("inputs", "x")),
        "it has no x",
    ),
    "an unknown role": (
        lambda p: _with_step(p, "linear", lambda s: {"inputs": {**s.inputs, "z": s.inputs["x"]}}),
        "z is no input",
    ),
    "columns beyond the buffer": (
        lambda p: _with_step(p, "linear", _input("x", column=8)),
        "columns beyond",
    ),
    "columns before the buffer": (
        lambda p: _with_step(p, "linear", _input("x", column=-8)),
        "columns beyond",
    ),
    "a width that is not the role's": (
        lambda p: _with_step(p, "linear", _input("x", width=8)),
        "x is 8 wide, not",
    ),
    "not in place": (
        lambda p: _with_step(
            p, "rotary", lambda s: {"outputs": {"x": Operand(buffer="logits", width=1)}}
        ),
        "x is 1 wide",
    ),
    "positions that are not the engine's": (
        lambda p: _with_step(p, "rotary", _input("positions", buffer="rows")),
        "positions is the engine's rows",
    ),
    "token ids as experts": (
        lambda p: _with_step(p, "experts", _input("ids", buffer="ids", width=1)),
        "ids is 1 wide",
    ),
    "the experts of another layer": (
        lambda p: _with_step(p, "experts", lambda s: {"weights": {"experts": "layer:2"}}),
        "not the experts of its layer",
    ),
    "a layer without up": (
        lambda p: p.model_copy(update={"experts": p.experts[:1] + p.experts[2:]}),
        "as many of gate, up and down",
    ),
    "an expert placed twice": (
        lambda p: p.model_copy(
            update={
                "placement": (
                    p.placement[0].model_copy(update={"tiers": {"host": "0-15,3"}}),
                    *p.placement[1:],
                )
            }
        ),
        "exactly one tier",
    ),
    "a placement on no GPU": (
        lambda p: p.model_copy(
            update={
                "placement": (
                    p.placement[0].model_copy(update={"tiers": {"host": "1-15", "gpu0": "0"}}),
                    *p.placement[1:],
                )
            }
        ),
        "the machine has no gpu0",
    ),
    "a rotary constant too short": (
        lambda p: p.model_copy(update={"constants": {n: v[1:] for n, v in p.constants.items()}}),
        "rotary constant",
    ),
    "a cache of another width": (
        lambda p: p.model_copy(update={"kv": _narrow(p.kv)}),
        "keep other states than the cache's layout says",
    ),
    "pages of no tokens": (
        lambda p: p.model_copy(update={"kv": p.kv.model_copy(update={"block": 0})}),
        "in blocks of 0",
    ),
    "fewer slots than sequences": (
        lambda p: p.model_copy(update={"kv": p.kv.model_copy(update={"sequences": 3})}),
        "16 sequences",
    ),
    "a context that the cache does not hold": (
        lambda p: p.model_copy(
            update={"limits": p.limits.model_copy(update={"max_context": 1 << 20})}
        ),
        "none for contexts of",
    ),
    "larger calls than kernels take": (
        lambda p: _with_phase(p, lambda phase: {"max_tokens": phase.max_tokens + 1}),
        "takes 16 tokens a call",
    ),
    "a vocabulary that is not the table's": (
        lambda p: p.model_copy(update={"model": p.model.model_copy(update={"vocab": 504})}),
        "no such array as logits",
    ),
    "a resource that is not there": (
        lambda p: _with_step(p, "linear", lambda s: {"resource": "gpu7"}),
        "cannot read",
    ),
}


def test_a_plan_as_compiled_passes(plan: Plan) -> None:
    verify_plan(plan)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named(plan: Plan, name: str) -> None:
    change, message = BROKEN[name]
    with pytest.raises(VerifyError, match=message):
        verify_plan(change(plan))


def test_a_buffer_over_what_its_own_step_reads_is_refused(plan: Plan) -> None:
    def over(phase: Phase) -> dict[str, Any]:
        step = next(step for step in phase.steps if step.op == "linear")
        at = next(b.offset for b in phase.buffers if b.name == step.inputs["x"].buffer)
        return {
            "buffers": tuple(
                each.model_copy(update={"offset": at})
                if each.name == step.outputs["y"].buffer
                else each
                for each in phase.buffers
            )
        }

    with pytest.raises(VerifyError, match="while it is in use"):
        verify_plan(_with_phase(plan, over))


@pytest.mark.parametrize(
    ("name", "shape", "group", "dtypes", "expected"),
    [
        ("f32", (5, 3), 0, ("F32",), (60,)),
        ("bf16", (7,), 0, ("BF16",), (14,)),
        ("fp8", (130, 129), 0, ("F8_E4M3", "F32"), (130 * 129, 16)),
        ("fp8", (130, 129), 0, ("F8_E4M3", "BF16"), (130 * 129, 8)),
        ("int4", (3, 64), 32, ("I32", "BF16"), (96, 12)),
    ],
)
def test_bytes_of_a_shape(
    name: str,
    shape: tuple[int, ...],
    group: int,
    dtypes: tuple[str, ...],
    expected: tuple[int, ...],
) -> None:
    planes = tuple(
        StoredPlane(name=plane, dtype=dtype, shard=-1, offset=0, bytes=0)
        for plane, dtype in zip(("codes", "scale"), dtypes, strict=False)
    )
    weight = Weight(name="w", format=name, shape=shape, group=group, planes=planes)
    assert tuple(expected_bytes(weight).values()) == expected


# -- order -----------------------------------------------------------------------------------------


def _moved(phase: Phase, **events: dict[str, Any]) -> Phase:
    """The phase with its third step on another resource, and other events."""
    steps = list(phase.steps)
    for at, update in {"s3": {"resource": "gpu"}, **events}.items():
        number = int(at.removeprefix("s"))
        steps[number] = steps[number].model_copy(update=update)
    return phase.model_copy(update={"steps": tuple(steps)})


def test_order_catches_a_read_before_its_write(plan: Plan) -> None:
    decode = plan.phase("decode")
    with pytest.raises(VerifyError, match="before anything wrote it"):
        check_order(decode.model_copy(update={"steps": decode.steps[1:]}))


def test_order_catches_a_missing_event(plan: Plan) -> None:
    with pytest.raises(VerifyError, match="without waiting for its write"):
        check_order(_moved(plan.phase("decode")))


def test_events_order_resources(plan: Plan) -> None:
    events = {
        "s2": {"signal": 1},
        "s3": {"resource": "gpu", "waits": (1,), "signal": 2},
        "s4": {"waits": (2,)},
    }
    check_order(_moved(plan.phase("decode"), **events))
    with pytest.raises(VerifyError, match="event 1 is signalled twice"):
        check_order(_moved(plan.phase("decode"), **events, s5={"signal": 1}))


def test_order_catches_reused_bytes(plan: Plan) -> None:
    decode = plan.phase("decode")
    inside = [buffer for buffer in decode.buffers if buffer.offset >= 0][:6]
    collided = tuple(
        buffer.model_copy(update={"offset": 0}) if buffer in inside else buffer
        for buffer in decode.buffers
    )
    with pytest.raises(VerifyError, match="while it is in use"):
        check_order(decode.model_copy(update={"buffers": collided}))


def test_the_table_of_ops_is_printed_from_their_rows() -> None:
    table = Path(__file__).parent.parent / "docs" / "ops.md"
    assert table.read_text().splitlines() == "\n".join(lines()).splitlines()


def test_every_row_is_whole() -> None:
    """Roles in place name an input; an op with kernels writes something."""
    for row in OPS.values():
        names = {role.name for role in row.inputs}
        assert all(role.in_place in names for role in row.outputs if role.in_place), row.name
        assert not row.native or row.outputs, row.name
