"""The memory of GPUs: ledgers of real models, and what a layout is made of."""

from __future__ import annotations

import pytest
from hybrid_plans import CONFIGS, ONE, TWO, plan_for

from hmc.compiler import compile as compile_plan
from hmc.plan import Plan
from hmc.plan.memory import SCRATCH, DeviceMemory, packed_bytes, rank_rows, slot_offsets

USABLE = 0.96


def _check(plan: Plan) -> None:
    """The ledger of every GPU is the layout that the runtime allocates, and fits."""
    for number, gpu in enumerate(plan.machine.gpus):
        name = f"gpu{number}"
        using = {phase.name: phase.max_tokens for phase in plan.phases}
        found = DeviceMemory.of(plan, name, using)
        counted = sum(item.bytes for item in plan.ledger if item.device == name)
        assert counted == found.region + found.beside
        assert counted <= USABLE * gpu.memory_bytes
        assert all(item.bytes > 0 for item in plan.ledger if item.device == name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "machine", "context"),
    [
        ("deepseek-v3", TWO, 46_080),
        pytest.param("deepseek-v3", ONE, 46_080, marks=pytest.mark.slow),
        pytest.param("deepseek-v3", ONE, 131_072, marks=pytest.mark.slow),
        pytest.param("deepseek-v3", TWO, 131_072, marks=pytest.mark.slow),
        pytest.param("kimi-k2", ONE, 46_080, marks=pytest.mark.slow),
        pytest.param("kimi-k2", TWO, 46_080, marks=pytest.mark.slow),
    ],
)
def test_whole_models_fit_the_machine_they_are_planned_for(
    model: str, machine: str, context: int
) -> None:
    plan = compile_plan(CONFIGS / model, machine=machine, dummy_weights=True, max_context=context)
    assert plan.phase("prefill.stream").max_tokens >= min(context, 60_000)
    _check(plan)


@pytest.mark.few(2)
@pytest.mark.parametrize("vram", [16, 24, 30])
@pytest.mark.parametrize("machine", [ONE, TWO])
def test_cut_models_fit_smaller_gpus(machine: str, vram: int) -> None:
    plan = plan_for("deepseek-v3", machine, 8, vram=vram)
    for number in range(len(plan.machine.gpus)):
        counted = sum(item.bytes for item in plan.ledger if item.device == f"gpu{number}")
        assert counted <= USABLE * vram * 1e9
    _check(plan)


def test_evicting_phases_begin_where_the_weights_do() -> None:
    plan = compile_plan(
        CONFIGS / "deepseek-v3",
        machine=ONE,
        dummy_weights=True,
        layers=8,
        vram=11,
        max_context=24_576,
    )
    phase = plan.phase("prefill.stream")
    found = DeviceMemory.of(plan, "gpu0", {each.name: each.max_tokens for each in plan.phases})
    assert any(slot.name == "dense0" for slot in phase.slots)
    assert found.begins["prefill.stream"] == 0
    assert "prefill.host" not in found.begins  # chunks have an arena of their own
    chunk = plan.phase("prefill.host").device_bytes["gpu0"] * plan.limits.max_chunk
    assert found.arenas["chunk"] == chunk > 0
    ends = [
        each.arena_at["gpu0"] + each.device_bytes["gpu0"] * each.max_tokens
        for each in plan.phases
        if each.slots
    ]
    assert found.region == max(found.weights, *ends)
    (item,) = [i for i in plan.ledger if (i.device, i.kind) == ("gpu0", "streaming")]
    assert item.bytes == found.region - found.weights
    assert "of dense weights were" in item.detail
    assert found.beside >= SCRATCH


def test_slots_lie_one_after_the_other_or_over_the_others() -> None:
    assert slot_offsets([(1000, False), (256, False), (300, True)]) == ([0, 1024, 0], 1280)
    assert slot_offsets([(100, False), (5000, True)]) == ([0, 0], 5120)


def test_rows_of_a_rank_cover_both_of_its_pieces() -> None:
    assert [rank_rows(tokens, 2) for tokens in (1, 4, 5, 8)] == [2, 2, 4, 4]
    assert rank_rows(7, 1) == 7


def test_tensors_are_padded_and_scales_widened() -> None:
    plan = plan_for("deepseek-v3", ONE)
    weight = next(each for each in plan.weights if each.format == "fp8")
    rows, columns = weight.shape
    scales = 4 * -(-rows // 128) * -(-columns // 128)
    codes = weight.planes[0].bytes
    assert packed_bytes([weight]) == codes + -(-scales // 256) * 256
