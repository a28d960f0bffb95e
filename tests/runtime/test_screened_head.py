"""A screened LM head changes no token: whatever is asked of sampling, alone and together, on every
tier; and logits that are left out are never missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paged_fake import request, tokens_of

import hmc
from hmc.codegen.isa import TIERS, best_isa, cpu_flags
from hmc.ops.screen import MOST_BEST
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.tokens.sampler import Sampler, SamplingParams

PROMPTS = [[5, 17, 230, 99, 4, 77], [3], [250, 251, 252, 40, 40, 40, 41, 8]]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "top_k": 5, "seed": 1},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.7, "seed": 2},
    {"temperature": 1.1, "top_k": 12, "min_p": 0.05, "seed": 3},
    {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
    {"temperature": 0.8, "top_k": 7, "presence_penalty": 1.5, "logit_bias": {9: -4}, "seed": 4},
    {"temperature": 0, "presence_penalty": -1.5},
    {"temperature": 0, "repetition_penalty": 0.7},
    {"temperature": 0, "logit_bias": {11: 3.0}},
    {"temperature": 1, "top_p": 0.9, "seed": 5},
    {"temperature": 1, "seed": 6},
]
ALL = [False] * 6 + [True] * 5
"""Which of them need all logits, from their second token on."""


KJV = Path(__file__).resolve().parents[2] / "examples" / "tiny-kjv"
BEST = best_isa(cpu_flags()).name
MODELS = [
    pytest.param((model, isa), marks=[] if (model, isa) == ("", BEST) else [pytest.mark.slow])
    for model in ("", str(KJV))
    for isa in TIERS
]
"""A model with random weights, and a trained one; each tier that this machine has."""


@pytest.fixture(scope="module", params=MODELS)
def engines(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path]
) -> Iterator[tuple[hmc.Engine, hmc.Engine]]:
    """The same model with its head as stored and screened."""
    model, isa = request.param
    if not TIERS[isa].flags <= cpu_flags():
        pytest.skip(f"this CPU lacks {isa}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HMC_ISA", isa)
        directory = model or checkpoint("qwen3_moe", "fp8", with_tokenizer=True)
        stored, screened = (
            hmc.compile(directory, max_context=128, lm_head=how) for how in ("stored", "screened")
        )
        assert {stored.isa, screened.isa} == {isa}
        with hmc.Engine(stored) as one, hmc.Engine(screened) as other:
            yield one, other


def _asked(engine: hmc.Engine) -> int:
    return engine.executor.screened["logits"]


@pytest.mark.parametrize(("how", "whole"), list(zip(SAMPLING, ALL, strict=True)))
def test_tokens_are_those_of_the_whole_head(
    engines: tuple[hmc.Engine, hmc.Engine], how: dict[str, Any], whole: bool
) -> None:
    stored, screened = engines
    before = _asked(screened)
    for ids in PROMPTS:
        alone = stored.generate(ids, max_new_tokens=25, **how)
        assert screened.generate(ids, max_new_tokens=25, **how).token_ids == alone.token_ids
    assert _asked(screened) - before == (0 if whole else 24 * len(PROMPTS))
    assert not stored.executor.screened


def test_together_with_those_that_need_all(engines: tuple[hmc.Engine, hmc.Engine]) -> None:
    """Many at once, of whom some have masks or want log-probabilities: the same tokens, and the
    same log-probabilities."""
    vocab = engines[0].plan.model.vocab
    odd = np.arange(vocab) % 2 == 1
    found = []
    for engine in engines:
        heard: list[list[Any]] = [[] for _ in range(3 * len(SAMPLING))]
        requests = []
        for number, log in enumerate(heard):
            more: dict[str, Any] = {"listener": lambda update, log=log: log.append(update.logprobs)}
            if number % 5 == 3:
                more["mask"] = lambda known: odd
            if number % 7 == 5:
                more["logprobs"] = 3
            how = SAMPLING[number % len(SAMPLING)]
            ids = PROMPTS[number % len(PROMPTS)]
            requests.append(request(ids, 5 + number, eos=(), sampling=how, **more))
        with Scheduler(engine.executor) as scheduler:
            tickets = [scheduler.submit(each) for each in requests]
            found.append(([tokens_of(ticket) for ticket in tickets], heard))
    assert found[0] == found[1]


def test_greedy_ones_together_are_screened(engines: tuple[hmc.Engine, hmc.Engine]) -> None:
    found = []
    for engine in engines:
        before = _asked(engine)
        with Scheduler(engine.executor) as scheduler:
            tickets = [scheduler.submit(request(ids, 9, eos=())) for ids in 3 * PROMPTS]
            found.append([tokens_of(ticket) for ticket in tickets])
        assert _asked(engine) - before == (9 * 8 if engine is engines[1] else 0)
    assert found[0] == found[1]


def test_logits_are_all_there_unless_few_are_asked_for(
    engines: tuple[hmc.Engine, hmc.Engine],
) -> None:
    ids = np.array(PROMPTS[0], np.int32)
    rows = []
    for engine in engines:
        executor = engine.executor
        sequences = [executor.open() for _ in range(2)]
        try:
            for sequence in sequences:
                assert [len(each) for each in executor.prefill(sequence, ids)][-1] == 1
            for best in (None, [1, 0], [1, MOST_BEST + 1], [1, 1]):
                logits = executor.decode(sequences, ids[:2], "", best)
                rows.append((engine is engines[1] and best == [1, 1], logits.copy()))
        finally:
            for sequence in sequences:
                executor.release(sequence)
    half = len(rows) // 2
    for (_, full), (few, logits) in zip(rows[:half], rows[half:], strict=True):
        there = logits > -np.inf
        assert there.all() != few
        np.testing.assert_array_equal(logits[there], full[there])
        np.testing.assert_array_equal(logits.argmax(axis=1), full.argmax(axis=1))


def _random_params(rng: np.random.Generator) -> SamplingParams:
    """Every argument is used by some."""
    some = rng.random(8) < 0.4
    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.3, 1.0, 2.0])),
        top_k=int(rng.integers(1, 12)) if some[0] or some[1] else 0,
        top_p=float(rng.uniform(0, 1)) if some[2] else 1.0,
        min_p=float(rng.uniform(0, 0.3)) if some[3] else 0.0,
        repetition_penalty=float(rng.uniform(0.6, 2)) if some[4] else 1.0,
        frequency_penalty=float(rng.uniform(-1, 2)) if some[5] else 0.0,
        presence_penalty=float(rng.uniform(-1, 2)) if some[6] else 0.0,
        logit_bias={int(rng.integers(60)): float(rng.uniform(-6, 2))} if some[7] else {},
        seed=int(rng.integers(1 << 30)),
    )


def _sampled(turns: int) -> int:
    """Sample with all logits, and with none but the best that are asked for; how often these were
    not all."""
    left_out = 0
    for turn in range(turns):
        rng = np.random.default_rng(turn)
        params, prompt = _random_params(rng), rng.integers(0, 60, 5).tolist()
        one, other = Sampler(params, prompt), Sampler(params, prompt)
        for _ in range(8):
            logits = (rng.standard_normal(60) * rng.choice([0.1, 3, 30])).astype(np.float32)
            if rng.random() < 0.3:
                logits = np.round(logits)  # ties
            few = logits.copy()
            if 0 < other.best <= len(few):
                few[few < np.sort(few)[-other.best]] = -np.inf
            left_out += bool(np.isinf(few).any())
            assert one.sample(logits) == other.sample(few), (turn, params)
    return left_out


def test_what_is_not_among_the_best_is_never_missed() -> None:
    assert _sampled(120) > 200


@pytest.mark.slow
def test_never_in_ten_thousand_draws() -> None:
    assert _sampled(5000) > 10_000


def test_who_needs_all_logits() -> None:
    found = [Sampler(SamplingParams(**how), [3, 4, 4]).best for how in SAMPLING]
    assert found == [1, 5, 40, 12, 3, 8, 1, 0, 0, 0, 0]
    lifting = Sampler(SamplingParams(presence_penalty=-1.5))
    lifting.sample(np.zeros(4, np.float32))
    assert lifting.best == 0
    lowering = Sampler(SamplingParams(frequency_penalty=1.0))
    lowering.sample(np.zeros(4, np.float32))
    assert lowering.best == 2
