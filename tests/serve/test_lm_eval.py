"""lm-eval's local-completions client against a live server: what it scores and what it is answered
is what the engine computes. `make test-eval` runs it: lm-eval is an extra of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmc.plan import Plan
from hmc.runtime.engine import Engine

TASKS = Path(__file__).parent / "lm_eval_task"
CONTEXT = 512

pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs lm-eval: make test-eval"
)


def log_likelihood(engine: Engine, given: list[int], wanted: list[int]) -> tuple[float, bool]:
    """The sum of the log-softmax of `wanted` after `given`, and whether each is the likeliest."""
    logits = engine.logits(given + wanted)[len(given) - 1 : -1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(wanted)), wanted]
    total = (chosen - np.log(np.exp(logits).sum(axis=1))).sum()
    return float(total), bool((logits.argmax(axis=1) == wanted).all())


def evaluate(
    url: str, model: Path, out: Path, batch: int, streams: int
) -> dict[str, list[dict[str, Any]]]:
    """The logged samples of each task."""
    arguments = {
        "base_url": f"{url}/v1/completions",
        "model": "tiny",
        "tokenizer_backend": "huggingface",
        "tokenizer": model,
        "max_length": CONTEXT,
        "num_concurrent": streams,
    }
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf")}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += [
        "--model_args",
        given,
        "--batch_size",
        str(batch),
        "--include_path",
        str(TASKS),
        "--log_samples",
    ]
    command += ["--tasks", "kjv_choice,kjv_rolling,kjv_generate", "--output_path", str(out)]
    environment = {**os.environ, **offline}
    run = subprocess.run(command, cwd=TASKS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {
        task: [json.loads(line) for line in path.read_text().splitlines()]
        for task in ("choice", "rolling", "generate")
        for path in out.glob(f"*/samples_kjv_{task}_*.jsonl")
    }


@pytest.mark.parametrize(("batch", "streams"), [(1, 1), (3, 4)], ids=["single", "batched"])
def test_lm_eval_gets_the_engines_figures(
    live: Any, plan: Plan, model: Path, tmp_path: Path, batch: int, streams: int
) -> None:
    samples = evaluate(live.url, model, tmp_path, batch, streams)
    verses = [json.loads(line) for line in (TASKS / "verses.jsonl").read_text().splitlines()]
    assert {task: len(found) for task, found in samples.items()} == dict.fromkeys(
        ("choice", "rolling", "generate"), len(verses)
    )
    with Engine(plan, model) as engine:
        text = engine.text
        assert text is not None
        bos = text.encode("x")[0]  # what the client puts in front of a text without a beginning

        def ids(words: str) -> list[int]:
            return text.encode(words, special=False)

        greedy = set()
        for sample in samples["choice"]:
            begin = sample["doc"]["begin"]
            for end, (reply,) in zip(sample["doc"]["ends"], sample["resps"], strict=True):
                whole, first = ids(f"{begin} {end}"), len(ids(begin))
                expected, likeliest = log_likelihood(engine, whole[:first], whole[first:])
                assert float(reply[0]) == pytest.approx(expected, rel=1e-5, abs=1e-4)
                assert (str(reply[1]) == "True") == likeliest
                greedy.add(likeliest)
        assert greedy == {True, False}  # so that both answers have been seen
        for sample in samples["rolling"]:
            doc = sample["doc"]
            words = ids(f"{doc['begin']} {doc['ends'][doc['right']]}")
            expected, _ = log_likelihood(engine, [bos], words)
            ((reply,),) = sample["resps"]
            assert float(reply) == pytest.approx(expected, rel=1e-5, abs=1e-4)
        for sample in samples["generate"]:
            ((answer,),) = sample["resps"]
            begin = ids(sample["doc"]["begin"])
            own = engine.generate(begin, max_new_tokens=24, temperature=0, stop=(".", ";"))
            assert answer == own.text
