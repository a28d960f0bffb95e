"""Predictions of models whose layers keep unlike things: what a sequence keeps costs the same at
any context, and nothing is counted where layers have no pages.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from hybrid_plans import ONE

from hmc.cli import cli
from hmc.compiler import compile as compile_plan
from hmc.errors import CapacityError, UsageError
from hmc.ops import OPS
from hmc.plan import Plan, Step
from hmc.plan.phases import PREFILL, STREAM, chunk_tokens, prompt_calls, prompt_stops
from hmc.predict.cost import Call, CostModel
from hmc.predict.run import run_decode, run_prefill
from hmc.tune.replan import replan

TINY = Path(__file__).parents[1] / "models" / "tiny" / "jamba.json"
LAYERS, ATTENDS, KV, WIDTH, STATES, TAPS = 8, 4, 2 * 2 * 256, 8192, 16, 4
CONTEXT = 32_768


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of real widths; one layer of eight attends."""
    found = tmp_path_factory.mktemp("unlike")
    config = json.loads(TINY.read_text()) | {
        "hidden_size": WIDTH // 2,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 4 * CONTEXT,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 14_336,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "attn_layer_offset": ATTENDS,
        "attn_layer_period": LAYERS,
        "mamba_d_state": STATES,
        "mamba_d_conv": TAPS,
        "mamba_dt_rank": 256,
    }
    (found / "config.json").write_text(json.dumps(config))
    return found


def planned(model: Path, **options: float | str) -> Plan:
    return compile_plan(model, dummy_weights=True, max_context=CONTEXT, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan(model: Path) -> Plan:
    return planned(model, machine=ONE, vram=16)


def kept(plan: Plan) -> int:
    """Bytes of a sequence's states in the layers that have them."""
    return (LAYERS - 1) * 4 * WIDTH * (STATES + TAPS - 1)


def moved(model: CostModel, plan: Plan, phase: str, call: Call) -> dict[int, float]:
    """Bytes of memory that the ops which keep something move, by layer, without transfers."""
    found = plan.phase(phase)
    sums: dict[int, float] = {}
    for step in found.steps:
        if _keeps(step):
            cost = model.step(found, step, call)
            sums[step.layer] = sums.get(step.layer, 0.0) + sum(cost.bytes.values())
    return sums


def _keeps(step: Step) -> bool:
    return bool(OPS[step.op].states(step.attrs))


def test_the_cache_is_that_of_the_layer_that_attends(plan: Plan) -> None:
    kv = plan.kv
    assert kv.bytes_per_token == 2 * KV
    assert kv.bytes_per_sequence == kv.bytes_per_snapshot == kept(plan)
    assert kv.snapshots == int(1e9) // kept(plan)
    items = {item.kind: item for item in plan.ledger if item.device == "gpu0"}
    assert items["KV cache"].bytes == 2 * KV * kv.capacity_tokens
    assert items["sequence states"].bytes == (kv.sequences + kv.snapshots) * kept(plan)


def test_states_cost_the_same_at_any_context(plan: Plan) -> None:
    model = CostModel(plan)
    for batch in (1, 4):
        near, far = (
            moved(model, plan, "decode", Call(batch, at, batch)) for at in (0, CONTEXT - 1)
        )
        grown = {layer for layer in far if far[layer] != near[layer]}
        assert grown == {ATTENDS}
        assert far[ATTENDS] - near[ATTENDS] == pytest.approx(2 * KV * batch * (CONTEXT - 1))
    one, many = (sum(moved(model, plan, "decode", Call(n, 0, n)).values()) for n in (1, 5))
    assert many - one > 4 * 2 * kept(plan)  # read and written, for each sequence
    # of a prompt once a call
    short, long = (moved(model, plan, PREFILL, Call(tokens)) for tokens in (1, 257))
    row = 4 * (2 * WIDTH + 3 * WIDTH + 2 * STATES)  # of the convolution, and of the scan
    for layer in set(short) - {ATTENDS}:
        assert long[layer] - short[layer] == 256 * row
        assert short[layer] - row >= 2 * kept(plan) / (LAYERS - 1)


def test_long_contexts_cost_what_one_layer_of_eight_reads(plan: Plan) -> None:
    model = CostModel(plan)
    near, far = (run_decode(plan, model, at, 1).seconds for at in (0, CONTEXT - 1))
    gpu = plan.machine.gpus[0].rates
    assert gpu is not None
    assert far - near == pytest.approx(2 * KV * CONTEXT / gpu.memory.value, rel=0.2)
    # and a streamed prompt no more than linearly, but for that layer's queries and keys
    half, whole = (model_seconds(plan, model, tokens) for tokens in (8192, 16_384))
    assert whole < 2.3 * half


def model_seconds(plan: Plan, model: CostModel, tokens: int) -> float:
    return run_prefill(plan, model, tokens, STREAM).seconds


def test_predictions_make_the_calls_that_the_runtime_makes(model: Path) -> None:
    plan = planned(model)
    tokens, past, taken = 5000, 0, []
    stops = plan.kv.stops(0, tokens)
    while past < tokens:
        taken.append(chunk_tokens(plan, PREFILL, tokens - past, 0, past, stops))
        past += taken[-1]
    assert prompt_stops(plan, PREFILL, tokens) == stops
    calls = prompt_calls(plan.phase(PREFILL).max_tokens, tokens, stops, plan.kv.aligned)
    assert [count for _, count in calls] == taken
    assert [stop.tokens for stop in stops] == [896, 2944, 3968, 4480, 4992]
    ends = {first + count for first, count in calls}
    assert {stop.tokens for stop in stops} <= ends and max(taken) <= 512
    assert all(one + before == other for (one, before), (other, _) in pairwise(calls))
    assert prompt_stops(plan, STREAM, tokens) == ()


def test_the_budget_of_snapshots_is_kept(model: Path) -> None:
    each = 4 * 4 * WIDTH * (STATES + TAPS - 1)
    for asked, held in ((3.5, 3), (0.9, 0)):
        plan = planned(model, layers=4, snapshot_memory=asked * each / 1e9)
        assert plan.kv.snapshots == held
        assert plan.options.snapshot_bytes == int(asked * each)
        (said,) = (each for each in plan.decisions if each.subject == "states of sequences")
        assert ("no prompt is reused" in said.choice) == (held == 0)
        (item,) = (item for item in plan.ledger if item.kind == "sequence states")
        assert item.bytes == (plan.kv.sequences + held) * each
        assert replan(plan, plan.placement).kv == plan.kv  # as `hmc tune` does
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="snapshot_memory"):
            planned(model, snapshot_memory=wrong)


def test_the_command_line_asks_for_it_and_shows_it(model: Path, tmp_path: Path) -> None:
    asked = ["--dummy-weights", "--layers", "2", "--max-context", "1024", "-o"]
    for memory, said in (("0.01", "8 snapshots of 1.25 MB"), ("0", "no prompt is reused")):
        path = str(tmp_path / f"{memory}.hmp")
        command = ["compile", str(model), *asked, path, "--snapshot-memory", memory]
        for arguments in (command, ["show", path]):
            result = CliRunner().invoke(cli, arguments)
            assert result.exit_code == 0, result.output
        assert said in " ".join(result.output.split())


def test_states_that_a_gpu_cannot_hold_are_named(model: Path) -> None:
    with pytest.raises(CapacityError, match=r"GB of states .* --snapshot-memory"):
        planned(model, machine=ONE, vram=6, snapshot_memory=8)
