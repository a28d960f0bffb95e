"""`hmc bench` runs, and its rows have the right keys and finite figures; times are not judged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hmc.bench.cases import Case, MatrixShape
from hmc.bench.compare import Compared, in_turn
from hmc.bench.kernels import KernelBench, Matrices
from hmc.bench.model import active_bytes, prefill_flops, total_bytes
from hmc.cli import main
from hmc.codegen.isa import best_isa
from hmc.compiler import compile as compile_plan
from hmc.plan import save_plan

Run = Callable[..., tuple[int, str, str]]

_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 1003,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
    "moe_intermediate_size": 160,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_CONFIG))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: (exit code, standard output, standard error) of `hmc bench`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


def _finite(record: dict[str, Any], *keys: str) -> None:
    for key in keys:
        assert math.isfinite(record[key]), (key, record)
        assert record[key] > 0, (key, record)


# -- comparing -------------------------------------------------------------------------------------


def test_values_and_references_take_turns() -> None:
    calls: list[str] = []

    def rate(name: str, value: float) -> Callable[[], float]:
        def once() -> float:
            calls.append(name)
            return value

        return once

    told: list[tuple[str, int, int]] = []
    values, reference = [rate("v", 3.0)], rate("r", 4.0)
    (found,) = in_turn(values, reference, 3, "it", lambda *what: told.append(what))
    assert "".join(calls) == "rvrvrvr"
    assert (found.value, found.reference, found.ratio) == (3.0, 4.0, 0.75)
    assert told[0] == ("it", 0, 3)
    assert told[-1] == ("it", 3, 3)


def test_several_take_turns() -> None:
    clock = iter(range(100))

    def now() -> float:
        return float(next(clock))

    first, second = in_turn([now, now], now, 2, "it")
    assert first == Compared(values=(1.0, 5.0), before=(0.0, 4.0), after=(2.0, 6.0))
    assert second == Compared(values=(3.0, 7.0), before=(2.0, 6.0), after=(4.0, 8.0))


def test_drift_cancels_in_the_ratio() -> None:
    found = Compared(values=(1.5, 2.5, 3.5), before=(2.0, 4.0, 6.0), after=(4.0, 6.0, 8.0))
    assert found.ratio == 0.5
    assert found.value == 2.5
    assert found.reference == 5.0


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "group", "weights", "scales"),
    [
        ("fp8", 0, 130 * 320, 4 * 2 * 3),
        ("bf16", 0, 2 * 130 * 320, 0),
        ("int4", 32, 130 * 160, 2 * 130 * 10),
    ],
)
def test_matrices_count_every_byte_a_kernel_reads(
    form: str, group: int, weights: int, scales: int
) -> None:
    shape = MatrixShape(form, 130, 320, group)
    assert [form.bytes for form in shape.forms] == [weights, *([scales] if scales else [])]
    matrices = Matrices((shape, shape), 3)
    try:
        assert matrices.set_bytes == 2 * (weights + scales)
        assert (matrices.weights % 64 == 0).all()
        starts = sorted(matrices.weights.reshape(-1).tolist())
        assert all(b - a == shape.stride for a, b in pairwise(starts))
        assert starts[-1] + shape.stride == matrices.address + matrices.size
        if scales:
            assert (matrices.scales - matrices.weights >= weights).all()
        else:
            assert (matrices.scales == 0).all()
    finally:
        matrices.close()


def test_cases_of_a_shape_share_weights() -> None:
    one, four = (Case("linear", "fp8", 64, 128, tokens) for tokens in (1, 4))
    assert one.matrices == four.matrices != Case("linear", "fp8", 128, 64, 1).matrices
    assert four.flops == 2 * 64 * 128 * 4
    assert Case("experts", "fp8", 64, 128, 2, top_k=3).flops == 2 * 3 * 64 * 128 * 2 * 3


def test_a_pass_of_experts_reads_them_all() -> None:
    case = Case("experts", "bf16", 32, 64, 2, top_k=3)
    matrices = Matrices(case.matrices, 8)
    with KernelBench(best_isa(), threads=1) as bench:
        work = bench.routed(case, matrices)
        # Two calls of 6 pairs over 8 experts: 12 reads, none twice in a call.
        assert work.amount == 12 * 3 * 32 * 64 * 2
        assert len(work.program) == 4
        assert [int(flag) for flag in work.program.records[:, 2]] == [0, 1, 1, 1]  # barriers
    matrices.close()


@pytest.mark.few(1)
@pytest.mark.parametrize("op", ["linear", pytest.param("experts", marks=pytest.mark.slow)])
def test_kernels_from_memory(run: Run, op: str) -> None:
    code, out, err = run(
        *("kernels", "--op", op, "--format", "fp8,bf16,int4", "--shape", "96x256"),
        *("--tokens", "1,3", "--group", 32, "--top-k", 2),
        *("--megabytes", 1, "--repetitions", 2, "--threads", 2, "--json"),
    )
    assert code == 0, err
    found = json.loads(out)
    assert [(row["format"], row["tokens"]) for row in found["rows"]] == [
        (form, tokens) for form in ("fp8", "bf16", "int4") for tokens in (1, 3)
    ]
    for row in found["rows"]:
        assert row["op"] == op
        assert row["shape"] == "96x256"
        _finite(row, "gbps", "reference_gbps", "ratio")
    assert found["threads"] == 2
    assert found["command"].startswith("hmc bench kernels --op")
    assert "streams" in found["reference"]
    assert {"machine", "isa", "date"} <= set(found)


@pytest.mark.few(1)
@pytest.mark.parametrize("op", ["linear_attention", "linear_attention_prefill"])
def test_kernels_that_keep_states(run: Run, op: str) -> None:
    many = op.endswith("prefill")
    code, out, err = run(
        *("kernels", "--op", op, "--shape", "64x16", "--tokens", 20 if many else 3),
        *("--megabytes", 1, "--repetitions", 2, "--threads", 2, "--json"),
    )
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert (row["op"], row["format"], row["shape"]) == (op, "f32", "64x16")
    unit = "gflops" if many else "gbps"
    _finite(row, unit, f"reference_{unit}", "ratio")


@pytest.mark.few(1)
@pytest.mark.parametrize("op", ["gemm", "grouped"])
def test_prefill_kernels_against_the_peak(run: Run, op: str) -> None:
    code, out, err = run(
        *("kernels", "--op", op, "--format", "fp8", "--shape", "96x256", "--tokens", 20),
        *("--top-k", 2, "--megabytes", 1, "--repetitions", 2, "--json"),
    )
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    _finite(row, "gflops", "reference_gflops", "ratio")


def test_kernels_from_l2_cut_the_rows(run: Run) -> None:
    arguments = ("kernels", "--l2", "--format", "bf16", "--shape", "100000x256", "--tokens", 1)
    code, out, err = run(*arguments, "--repetitions", 1, "--json")
    assert code == 0, err
    found = json.loads(out)
    (row,) = found["rows"]
    _finite(row, "gbps", "reference_gbps", "ratio")
    assert 16 <= int(row["shape"].split("x")[0]) < 100000
    assert found["threads"] == 1


def test_kernel_table(run: Run) -> None:
    code, out, err = run(
        *("kernels", "--format", "bf16", "--shape", "64x128", "--tokens", 1),
        *("--megabytes", 1, "--repetitions", 1, "--no-barriers"),
    )
    assert code == 0, err
    for part in ("64x128", "reference GB/s", "ratio", "prefetch"):
        assert part in out


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_config_alone_is_benched_with_dummy_weights(config: Path, run: Run) -> None:
    code, out, err = run(
        *(config, "--dummy-weights", "--layers", 2, "-p", "5,20", "-n", 3, "--context", 7),
        *("--repetitions", 2, "--threads", 2, "--megabytes", 1, "--json"),
    )
    assert code == 0, err
    found = json.loads(out)
    assert [row["test"] for row in found["rows"]] == ["pp5", "pp20", "tg3@7"]
    for row in found["rows"]:
        _finite(row, "tokens_per_second", "min", "max")
        assert row["min"] <= row["tokens_per_second"] <= row["max"]
    for row in found["rows"][:2]:
        _finite(row, "gflops", "reference_gflops", "peak_share")
    decode = found["rows"][2]
    _finite(decode, "mbu", "reference_gbps", "gbps")
    assert 0 < decode["outside_kernels"] < 1
    assert decode["waiting"] >= 0
    assert decode["python"] > 0
    assert {"linear", "experts", "attention"} <= {op["op"] for op in decode["ops"]}
    assert 0 < sum(op["share"] for op in decode["ops"]) < 1
    assert found["reference_gbps"] == decode["reference_gbps"]
    assert found["threads"] == 2
    assert found["model"] == "Qwen3MoeForCausalLM, 2 layers"
    assert found["formats"] == "fp8+bf16"
    assert {"machine", "isa", "date", "command", "reference", "kernels"} <= set(found)


def test_bytes_of_a_batch_are_those_of_distinct_experts(config: Path) -> None:
    """8 experts of which a token takes 2: two tokens choose 3.5 on average."""
    plan = compile_plan(config, dummy_weights=True, max_context=64)
    experts = sum(s.weight_bytes for s in plan.phase("decode").steps if s.op == "experts")
    top_k, count = plan.model.top_k, plan.model.experts
    distinct = count * (1 - (1 - top_k / count) ** 2)
    more = experts * (distinct / top_k - 1)
    assert active_bytes(plan, 2) - active_bytes(plan) == pytest.approx(more, abs=1)
    assert 0 < more < experts


def test_a_plan_is_benched_as_a_table(config: Path, tmp_path: Path, run: Run) -> None:
    plan = compile_plan(config, dummy_weights=True, max_context=64)
    save_plan(plan, tmp_path / "plan.hmp")
    code, out, err = run(
        *(tmp_path / "plan.hmp", "--dummy-weights", "-p", 0, "-n", 2, "--by-op"),
        *("--batch", "1,3", "--repetitions", 1, "--megabytes", 1),
    )
    assert code == 0, err
    assert re.search(r"^tg2x3: \d+\.\d\d x the tokens/s of tg2$", out, re.MULTILINE), out
    for part in ("qwen3_moe 3L", "tg2", "MBU", "streaming read", "us a token", "experts"):
        assert part in out
    assert "pp" not in out


def test_bytes_and_flops_of_a_plan(config: Path) -> None:
    plan = compile_plan(config, dummy_weights=True, layers=1, max_context=64)
    hidden, vocab, heads, kv, inner = 256, 1003, 256, 128, 160
    attention = hidden * (heads + 2 * kv) + heads * hidden
    experts, router, head = 3 * hidden * inner, 16 * hidden, vocab * hidden
    blocks = 4 * (2 * 2 + 2 * 1 * 2 + 2 * 2) + 4 * 4 * 3 * 4
    norms = 2 * (3 * hidden + 2 * 64)
    read = attention + 4 * experts + 2 * router + 2 * head + 2 * hidden + norms + blocks
    assert active_bytes(plan) == read
    rest = 12 * (experts + 4 * 3 * 4) + 2 * (vocab - 1) * hidden
    assert total_bytes(plan) == read + rest
    per_token = 2 * (attention + 4 * experts + router)
    assert prefill_flops(plan, 10) == 10 * per_token + 2 * head


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("nowhere",), "no such directory or file"),
        (("CONFIG",), "needs --dummy-weights"),
        (
            ("CONFIG", "--dummy-weights", "-p", "a"),
            "'-p' / '--prompts': 'a' is not a valid whole number",
        ),
        (("CONFIG", "--dummy-weights", "-p", "5,,6"), "commas"),
        (("CONFIG", "--dummy-weights", "-p", "-5"), "x>=0"),
        (("CONFIG", "--dummy-weights", "-p", "0", "-n", "0"), "nothing to measure"),
        (("CONFIG", "--dummy-weights", "-n", "-1"), "x>=0"),
        (("CONFIG", "--dummy-weights", "--context", "-1"), "x>=0"),
        (("CONFIG", "--dummy-weights", "--repetitions", "0"), "x>=1"),
        (("CONFIG", "--dummy-weights", "--threads", "0"), "1<=x<=4096"),
        (("CONFIG", "--dummy-weights", "--layers", "9"), "--layers 9"),
        (("CONFIG", "--dummy-weights", "--home", "arena"), "huge pages always"),
        (("PLAN", "--dummy-weights", "--layers", "1"), "not a plan"),
        (("PLAN", "--dummy-weights", "-p", "65"), "context of 64"),
        (("PLAN", "--dummy-weights", "-p", "0", "-n", "8", "--context", "60"), "context of 64"),
        (("kernels", "--shape", "64"), "ROWSxK"),
        (("kernels", "--shape", "0x64"), "positive"),
        (("kernels", "--tokens", "17"), "1 to 16 tokens"),
        (("kernels", "--tokens", "0"), "x>=1"),
        (("kernels", "--format", "q4"), "formats fp8"),
        (("kernels", "--format", "int4", "--shape", "64x72", "--group", "32"), "whole groups"),
        (("kernels", "--format", "int4", "--shape", "64x72", "--group", "24"), "32, 64 or 128"),
        (("kernels", "--isa", "sse2"), "no such kernel tier"),
        (("kernels", "--l2", "--op", "experts"), "--op linear alone"),
        (("kernels", "--op", "linear_attention", "--format", "bf16"), "states are f32"),
        (("kernels", "--l2", "--threads", "2"), "one core"),
        (("kernels", "--repetitions", "0"), "x>=1"),
        (("kernels", "--megabytes", "-1"), "x>=0"),
    ],
)
def test_bad_arguments_give_one_line(
    arguments: tuple[str, ...], part: str, config: Path, tmp_path: Path, run: Run
) -> None:
    names = {"CONFIG": config, "PLAN": tmp_path / "plan.hmp"}
    if "PLAN" in arguments:
        save_plan(compile_plan(config, dummy_weights=True, max_context=64), names["PLAN"])
    code, out, err = run(*(names.get(word, word) for word in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("hmc: error: ")
    assert err.count("\n") == 1
    assert part in err


def test_help_names_both_forms(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "hmc bench TARGET [OPTIONS] | COMMAND" in out
    assert "kernels" in out
    code, out, _ = run("kernels", "--help")
    assert code == 0
    assert "hmc bench kernels [OPTIONS]" in out
