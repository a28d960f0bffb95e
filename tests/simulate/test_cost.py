"""Formulas of the cost model against enumeration and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
from hybrid_plans import ONE, named, plan_for, with_rate
from hypothesis import given
from hypothesis import strategies as st

from hmc.errors import MachineError
from hmc.machine.model import CpuRates, GemvRate, Rate
from hmc.ops import OPS, Load
from hmc.ops.attention import Bounds, attended, gqa_flops, mla_flops
from hmc.ops.matmul import distinct_experts
from hmc.plan import Plan, Step
from hmc.predict.cost import (
    Call,
    CostModel,
    declared_as,
    gemv_rate,
)

MLA = {"heads": 128, "nope": 128, "rope": 64, "v_dim": 128, "rank": 512}


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens"), [(4, 2, 1), (4, 2, 2), (5, 2, 3), (6, 3, 2)]
)
def test_distinct_experts_is_the_mean_over_all_choices(
    experts: int, top_k: int, tokens: int
) -> None:
    choices = list(itertools.combinations(range(experts), top_k))
    total = sum(len(set().union(*each)) for each in itertools.product(choices, repeat=tokens))
    assert distinct_experts(experts, top_k, tokens) == pytest.approx(total / len(choices) ** tokens)


def test_distinct_experts_of_deepseek() -> None:
    found = [round(distinct_experts(256, 8, tokens), 2) for tokens in (1, 2, 3)]
    assert found == [8.0, 15.75, 23.26]
    assert distinct_experts(256, 8, 4, 128) == pytest.approx(distinct_experts(256, 8, 4) / 2)


@given(st.integers(1, 30), st.integers(0, 50), st.integers(1, 4))
def test_attended_counts_query_key_pairs(own: int, context: int, sequences: int) -> None:
    pairs = sequences * sum(context + position + 1 for position in range(own))
    assert attended(own * sequences, context, sequences) == pairs


@given(
    st.integers(1, 30),
    st.integers(0, 50),
    st.integers(1, 4),
    st.sampled_from((Bounds(window=1), Bounds(window=13), Bounds(chunk=1), Bounds(chunk=9))),
)
def test_bounds_count_too(own: int, context: int, sequences: int, bounds: Bounds) -> None:
    places = range(context, context + own)
    firsts = [max(0, bounds.first(place)) for place in places]
    pairs = sum(place + 1 - first for place, first in zip(places, firsts, strict=True))
    assert attended(own * sequences, context, sequences, bounds) == sequences * pairs
    attrs = {"heads": 1, "kv_heads": 1, "head_dim": 1, "v_dim": 1, "window": bounds.window}
    attrs |= {"chunk": bounds.chunk}
    work = OPS["attention"].work(attrs, Load(1, own * sequences, sequences, context))
    assert work.keys == sequences * (context + own - firsts[0])


def test_prefill_attention_of_deepseek_is_2_5e6_n_squared() -> None:
    tokens = 20_480
    flops = 61 * mla_flops(MLA, attended(tokens, 0), tokens, tokens)
    assert flops == pytest.approx(2.5e6 * tokens**2, rel=0.01)


def test_latent_attention_takes_the_cheaper_form() -> None:
    decode = mla_flops(MLA, attended(1, 32_768), 1, 32_769)
    assert decode == 2.0 * 128 * (2 * 512 + 64) * 32_769  # absorbed
    prefill = mla_flops(MLA, attended(4096, 0), 4096, 4096)
    assert prefill == 2.0 * 128 * 320 * attended(4096, 0)  # expanded, nothing lifted twice


def test_plain_attention_and_cache_bytes() -> None:
    assert gqa_flops(32, 128, 128, 100) == 2 * 32 * 256 * 100
    one = OPS["mla"].work(MLA, Load(1, 1, context=32_768))
    assert one.keys == 32_769
    four = OPS["mla"].work(MLA, Load(4, 4, sequences=4, context=100))
    assert four.keys == 4 * 100 + 4


def _rates(*points: tuple[str, int, float]) -> CpuRates:
    def rate(value: float) -> Rate:
        return Rate(value=value, kind="assumed", source="test")

    return CpuRates(
        read=(rate(1e11),),
        gemv=tuple(GemvRate(format=f, tokens=t, rate=rate(v)) for f, t, v in points),
        dot=rate(1e12),
        attend=rate(1e12),
        record=rate(1e-6),
    )


def test_gemv_rates_lie_between_the_measured_points() -> None:
    rates = _rates(("fp8", 8, 50.0), ("fp8", 1, 100.0), ("bf16", 1, 7.0))
    assert [gemv_rate(rates, "fp8", tokens) for tokens in (1, 4.5, 8, 99)] == [100, 75, 50, 50]


def test_formats_without_a_rate_take_that_of_the_nearest() -> None:
    rates = _rates(("fp8", 1, 100.0), ("bf16", 1, 7.0), ("int4", 1, 50.0))
    for form, near in (("nvfp4", "int4"), ("q5_k", "int4"), ("mxfp8", "fp8"), ("fp16", "bf16")):
        assert declared_as(rates, form) == near
        assert gemv_rate(rates, form, 1) == gemv_rate(rates, near, 1)
    with pytest.raises(MachineError, match="declares no gemv rates"):
        gemv_rate(_rates(), "int4", 1)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for("deepseek-v3", ONE, 10, vram=31)


def _experts(plan: Plan, phase: str) -> Step:
    """The last one: its layer is on the host as a whole."""
    steps = plan.phase(phase).steps
    return [s for s in steps if s.op == "experts" and s.resource == "cpu"][-1]


def test_experts_on_the_cpu_cost_bytes_and_barriers(plan: Plan) -> None:
    model = CostModel(plan)
    step = _experts(plan, "decode")
    cost = model.step(plan.phase("decode"), step, Call(1, 128))
    size = 44_050_944
    rates = plan.machine.rates
    assert rates is not None and rates.expert is not None and rates.handoff is not None
    fixed = 8 * rates.expert.value + 2 * rates.record.value + rates.handoff.value
    assert cost.bound == "weights"
    assert cost.seconds == pytest.approx(8 * size / 9.47e11 + fixed, rel=1e-3)
    assert cost.flops["fp8"] == pytest.approx(8 * 2 * 3 * 7168 * 2048)
    many = model.step(plan.phase("prefill.host"), _experts(plan, "prefill.host"), Call(512))
    assert many.bound == "compute"


def test_parts_of_a_layer_add_up(plan: Plan) -> None:
    """Resident and host experts of a mixed layer together do the layer's FLOPs."""
    phase, model = plan.phase("decode"), CostModel(plan)
    mixed = [p.layer for p in plan.placement if len(p.tiers) > 1]
    assert mixed
    steps = [s for s in phase.steps if s.op == "experts" and s.layer == mixed[0]]
    flops = sum(model.step(phase, step, Call(3, 10, 3)).flops["fp8"] for step in steps)
    assert flops == pytest.approx(3 * 8 * 2 * 3 * 7168 * 2048)


def test_a_slower_machine_is_slower(plan: Plan) -> None:
    slow = CostModel(plan, with_rate(named(ONE), expert=1e-3))
    step = _experts(plan, "decode")
    call = Call(1, 128)
    phase = plan.phase("decode")
    assert slow.step(phase, step, call).seconds > 8e-3
    assert math.isfinite(CostModel(plan).step(phase, step, call).seconds)


def test_a_machine_without_rates_predicts_nothing(plan: Plan) -> None:
    bare = plan.machine.model_copy(update={"rates": None})
    with pytest.raises(MachineError, match="declares no rates"):
        CostModel(plan, bare)


def test_a_machine_without_the_plans_gpu_is_refused(plan: Plan) -> None:
    model = CostModel(plan, named("laptop"))
    phase = plan.phase("decode")
    step = next(step for step in phase.steps if step.resource == "gpu0")
    with pytest.raises(MachineError, match="has no gpu0"):
        model.step(phase, step, Call(1))
