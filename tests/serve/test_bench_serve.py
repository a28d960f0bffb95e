"""The load generator: what it sends, what it counts, and a live server under it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hmc.bench.serve.client import Reply
from hmc.bench.serve.load import Lengths, Shot, poisson, trace
from hmc.bench.serve.run import figures, full_steps, pace, percentiles
from hmc.cli import cli
from hmc.errors import ExecutionError, HmcError, UsageError
from hmc.plan import Goals
from hmc.predict.goals import parse_goals


def _bench(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["bench", "serve", *arguments, "--json"])
    assert result.exception is None, result.exception
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_arrivals_are_a_poisson_process_and_lengths_a_mix() -> None:
    random = np.random.default_rng(1)
    shots = poisson(4000, 20.0, Lengths(8, 16), Lengths(3, 3), random)
    gaps = np.diff([shot.arrival for shot in shots])
    assert shots[0].arrival == 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential
    assert {shot.prompt for shot in shots} == set(range(8, 17))
    assert {shot.output for shot in shots} == {3}


def test_arguments_are_read_or_refused(tmp_path: Path) -> None:
    goals = parse_goals("ttft=30s,tps=20", lengths=False)
    assert (goals.ttft_seconds, goals.tokens_per_second) == (30, 20)
    goals = parse_goals("ttft=250ms", lengths=False)
    assert (goals.ttft_seconds, goals.tokens_per_second) == (0.25, 0)
    for wrong in ("ttft", "tps=-1", "other=3", "ttft=fast", "ttft=30s@32k", "tps=20@1k"):
        with pytest.raises(UsageError, match="write goals as ttft=30s,tps=20"):
            parse_goals(wrong, lengths=False)
    assert Lengths.read("--prompt", "7") == Lengths(7, 7)
    for wrong in ("", "0-3", "9-3", "x"):
        with pytest.raises(UsageError, match="--prompt"):
            Lengths.read("--prompt", wrong)
    path = tmp_path / "trace"
    path.write_text(
        '{"arrival": 2, "prompt": 5, "output": 1}\n{"arrival": 1, "prompt": 4, "output": 2}'
    )
    assert trace(path) == [Shot(1, 4, 2), Shot(2, 5, 1)]
    path.write_text('{"arrival": 2}')
    with pytest.raises(UsageError, match="line 1"):
        trace(path)


def test_figures_of_replies() -> None:
    shot = Shot(0, 10, 5)
    replies = (
        Reply(shot, 0.0, ttft=1.0, total=2.0, tokens=5),  # 4 tok/s after the first
        Reply(shot, 1.0, ttft=3.0, total=4.0, tokens=11),  # 10 tok/s, but late
        Reply(shot, 1.0, ttft=0.5, total=0.5, tokens=1),
        Reply(shot, 0.0, error="HTTP 429"),
    )
    found = figures(replies, Goals(ttft_seconds=2.0, tokens_per_second=4.0))
    assert (found["requests"], found["failed"], found["errors"]) == (4, 1, ["HTTP 429"])
    assert found["seconds"] == 5.0 and found["output_tokens_per_second"] == 17 / 5
    assert found["ttft"]["p50"] == 1.0 and found["tpot"]["mean"] == pytest.approx(0.175)
    assert found["slo_attainment"] == 0.5
    assert percentiles([])["p50"] is None


def test_a_load_on_a_live_server(live: Any, tmp_path: Path) -> None:
    mix = ("--prompt", "4-40", "--output", "2-9")
    found = _bench(live.url, "-n", "12", "--concurrency", "3", *mix, "--slo", "ttft=60s")
    assert found["failed"] == 0 and found["slo_attainment"] == 1
    assert 24 <= found["output_tokens"] <= 12 * 9
    assert 0 < found["ttft"]["p50"] <= found["ttft"]["p99"]
    assert 0 < found["scheduler_own_share"] < 1
    assert _bench(live.url, "-n", "6", "--rate", "200", *mix)["requests"] == 6
    path = tmp_path / "trace"
    path.write_text('{"arrival": 0.01, "prompt": 5, "output": 3}\n' * 2)
    assert _bench(live.url, "--trace", str(path))["output_tokens"] == 6


def test_one_prompt_beside_decoding(live: Any) -> None:
    found = _bench(live.url, "--prefill", "2", "--prompt", "8-600", "--output", "100")
    assert (found["prompt"], found["decodes"]) == (600, 2)
    assert found["ttft_alone"] > 0 and found["tpot_factor"] > 0
    assert found["ttft_rise"] == found["ttft_together"] / found["ttft_alone"] - 1


def test_a_plan_is_served_for_the_test_and_failures_show(plan_path: Path, live: Any) -> None:
    found = _bench(str(plan_path), "-n", "3", "--prompt", "5", "--output", "2")
    assert (found["failed"], found["output_tokens"]) == (0, 6)
    refused = CliRunner().invoke(cli, ["bench", "serve", live.url, "-n", "2", "--prompt", "5000"])
    assert isinstance(refused.exception, HmcError) and "context" in str(refused.exception)
    nobody = CliRunner().invoke(cli, ["bench", "serve", "http://127.0.0.1:9", "-n", "2"])
    assert isinstance(nobody.exception, UsageError)


def test_shares_of_a_step_come_from_steps_of_all_streams() -> None:
    full, alone, beside = [0.1, 0.09, 2, 0], [9.0, 9.0, 1, 0], [9.0, 9.0, 2, 5]
    found = {"steps": 50, "recent": [[9.0, 9.0, 2, 0]] * 20 + [alone, beside] + [full] * 8}
    assert full_steps(found, 40, 2) == (pytest.approx(0.1), pytest.approx(0.09), 8)
    with pytest.raises(ExecutionError, match="only 7 steps"):
        full_steps(found, 43, 2)
    shot = Shot(0, 4, 20)
    late = Reply(shot, 0.0, stamps=tuple(5 + 0.1 * i for i in range(20)))
    early = Reply(shot, 0.0, stamps=tuple(1 + 0.5 * i for i in range(8)) + late.stamps[:12])
    assert pace([late, early]) == pytest.approx(0.1)
    with pytest.raises(ExecutionError, match="same time"):
        pace([late, Reply(shot, 0.0, stamps=(1.0, 2.0))])


def test_streams_on_a_live_server(live: Any) -> None:
    found = _bench(live.url, "--streams", "3", "--prompt", "8", "--output", "60")
    assert found["streams"] == 3 and found["steps"] >= 8
    assert 0 < found["executor"] < found["scheduler"]
    assert found["step"] > 0 and found["client_cpu"] > 0
    assert found["server_share"] == 1 - found["undisturbed"] / found["step"]
    too_many = CliRunner().invoke(
        cli, ["bench", "serve", live.url, "--streams", "3", "--output", "2"]
    )
    assert isinstance(too_many.exception, HmcError) and "--output" in str(too_many.exception)
