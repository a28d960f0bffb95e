"""The sampler against transformers' filters, against plain numpy, and against its own promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hmc.errors import ExecutionError, UsageError
from hmc.runtime.sampler import Sampler, SamplingParams


def logits(seed, vocab):
    return (np.random.default_rng(seed).standard_normal(vocab) * 3).astype(np.float32)


def dense(sampler, row):
    ids, probabilities = sampler.candidates(row)
    out = np.zeros(len(row))
    out[ids] = probabilities
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    vocab=st.sampled_from([2, 7, 33, 1500, 9001]),
    temperature=st.floats(0.1, 2.5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
    penalty=st.floats(0.5, 2.0),
)
def test_filters_agree_with_transformers(seed, vocab, temperature, top_k, top_p, min_p, penalty):
    row = logits(seed, vocab)
    prompt = list(np.random.default_rng(seed).integers(0, vocab, 9))
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        processors.append(MinPLogitsWarper(min_p))
    scores = processors(torch.tensor([prompt]), torch.tensor(row, dtype=torch.float64)[None])
    expected = torch.softmax(scores[0], -1).numpy()
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty, seed=1)
    actual = dense(Sampler(params, prompt), row)
    if not np.array_equal(actual > 0, expected > 0):
        # A cut may fall on the other side of a token when its cumulative share equals the bound to
        # rounding.
        assert abs(int((actual > 0).sum()) - int((expected > 0).sum())) <= 1
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_draws_follow_the_distribution():
    row = logits(3, 11)
    sampler = Sampler(SamplingParams(temperature=0.8, seed=5))
    expected = dense(sampler, row)
    counts = np.bincount([sampler.sample(row) for _ in range(20_000)], minlength=11)
    spread = np.sqrt(20_000 * expected * (1 - expected))
    assert (np.abs(counts - 20_000 * expected) < 4.5 * spread + 1).all()


def test_greedy_takes_the_lowest_of_equal_ids_and_keeps_no_random_state():
    row = np.array([0, 5, 1, 5], np.float32)
    assert [Sampler(SamplingParams()).sample(row) for _ in range(3)] == [1, 1, 1]


def test_repetition_penalty_counts_answered_tokens_too():
    row = np.array([3.0, 2.9, -1.0], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=1.2))
    assert [sampler.sample(row), sampler.sample(row)] == [0, 1]


def test_one_seed_one_stream():
    row = logits(0, 500)
    runs = [[Sampler(SamplingParams(1.0, seed=s)).sample(row) for _ in range(1)] for s in (7, 7, 8)]
    first, second = (Sampler(SamplingParams(1.0, seed=7)) for _ in range(2))
    assert [first.sample(row) for _ in range(20)] == [second.sample(row) for _ in range(20)]
    assert runs[0] == runs[1]


def test_top_k_one_and_tiny_top_p_are_greedy():
    row = logits(1, 3000)
    for params in (SamplingParams(1.0, top_k=1), SamplingParams(1.0, top_p=1e-9)):
        assert Sampler(params).sample(row) == row.argmax()


def test_masked_tokens_are_never_drawn():
    row = np.full(50, -np.inf, np.float32)
    row[[3, 9]] = 1.0
    sampler = Sampler(SamplingParams(1.5, top_p=0.999, top_k=40, seed=0))
    assert {sampler.sample(row) for _ in range(100)} == {3, 9}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_raise(bad):
    row = logits(0, 9)
    row[4] = bad
    with pytest.raises(ExecutionError, match="NaN"):
        Sampler(SamplingParams()).sample(row)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -4),
        ("seed", True),
    ],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(UsageError, match=f"^{name}="):
        SamplingParams.resolve({name: value})


def test_resolve_merges_generation_config():
    file = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 3}
    assert SamplingParams.resolve({}, file) == SamplingParams(0.6, 20, 0.95)
    assert SamplingParams.resolve({"top_k": 5, "min_p": None}, file) == SamplingParams(0.6, 5, 0.95)
    assert SamplingParams.resolve({"temperature": 0}, file).greedy
    assert SamplingParams.resolve({}, {"temperature": 0.6}).greedy
    assert SamplingParams.resolve({}, {"do_sample": False, "temperature": 0.6}).greedy
    assert SamplingParams.resolve({}).greedy
    assert SamplingParams.resolve({"temperature": 0.5}, {"do_sample": False}).temperature == 0.5
    assert SamplingParams.resolve({"top_p": 0.5}).temperature == 1.0
    with pytest.raises(UsageError, match="top_x"):
        SamplingParams.resolve({"top_x": 1})
