"""The sampler against transformers' filters, against plain numpy, and against its own promises."""

from types import SimpleNamespace

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
from hmc.runtime.tokens.sampler import Sampler, SamplingParams


def logits(seed, vocab):
    return (np.random.default_rng(seed).standard_normal(vocab) * 3).astype(np.float32)


def candidates(sampler, row):
    """Ids that survive every filter, likeliest first unless no filter is on, and their
    probabilities."""
    scores, likeliest = sampler._scores(row)
    if sampler._params.greedy:
        return np.array([likeliest]), np.ones(1)
    ids, weights = sampler._survivors(scores, float(scores[likeliest]))
    if ids is None:
        ids = np.arange(len(weights))
    else:
        order = np.lexsort((ids, -weights))
        ids, weights = ids[order], weights[order]
    return ids, weights / weights.sum()


def dense(sampler, row):
    ids, probabilities = candidates(sampler, row)
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


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.97, "min_p": 0.02},
    {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 1.2, "top_k": 700, "repetition_penalty": 0.8},
]


def by_definition(row, prompt, temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Probabilities f64 [vocab], everything sorted and nothing saved."""
    scores = row.astype(np.float64)
    for token in set(prompt):
        factor = repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
        scores[token] *= factor
    order = np.argsort(-scores, kind="stable")
    weights = np.exp((scores - scores.max()) / temperature)
    if top_k:
        weights[scores < scores[order[min(top_k, len(row)) - 1]]] = 0
    if top_p < 1:
        count = np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum()) + 1
        weights[order[count:]] = 0
    weights[weights < min_p] = 0
    return weights / weights.sum()


@pytest.mark.few(3)
@pytest.mark.parametrize("vocab", [40, 151_936])
@pytest.mark.parametrize("how", SETTINGS)
def test_distribution_is_that_of_the_definition(vocab, how):
    """The probabilities exactly, and the draws by a chi-square test over groups of tokens."""
    row, prompt = logits(vocab, vocab), [3, 5, 5, 11]
    row[7] = -np.inf
    expected = by_definition(row, prompt, **how)
    sampler = Sampler(SamplingParams(**how, seed=9), prompt)
    np.testing.assert_allclose(dense(sampler, row), expected, rtol=1e-9, atol=1e-15)

    draws = 1500 if vocab < 1000 else 600
    tokens = [Sampler(SamplingParams(**how, seed=s), prompt).sample(row) for s in range(draws)]
    assert expected[tokens].min() > 0
    # Groups of about a twentieth of the draws each, likeliest tokens first.
    order = np.argsort(-expected, kind="stable")
    ends = np.minimum(np.cumsum(expected[order]) * 20, 19).astype(int)
    group = np.empty(vocab, int)
    group[order] = ends
    due = draws * np.bincount(group, expected, minlength=20)
    got = np.bincount(group[tokens], minlength=20)[due > 5]
    due = due[due > 5]
    chi_square = ((got - due) ** 2 / due).sum()
    freedom = max(len(due) - 1, 1)
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("how", SETTINGS)
def test_draw_depends_on_seed_and_logits_alone(how):
    """Not on where the row lies, nor on who else samples in between."""
    rows = np.stack([logits(i, 20_000) for i in range(6)])
    alone = Sampler(SamplingParams(**how, seed=4), [1, 2])
    expected = [alone.sample(row.copy()) for row in rows]
    among = Sampler(SamplingParams(**how, seed=4), [1, 2])
    other = Sampler(SamplingParams(1.0, top_p=0.5, seed=5))
    spaced = np.zeros((6, 20_001), np.float32)
    spaced[:, 1:] = rows
    before = spaced.copy()
    actual = []
    for row in spaced:
        other.sample(row[1:])
        actual.append(among.sample(row[1:]))
    assert actual == expected
    np.testing.assert_array_equal(spaced, before)


def test_stream_of_a_seed_is_fixed():
    row = np.zeros(4096, np.float32)  # no rounding: every weight is 1
    sampler = Sampler(SamplingParams(1.0, seed=11))
    stream = np.random.Generator(np.random.PCG64(11)).random(50)
    assert [sampler.sample(row) for _ in range(50)] == np.floor(stream * 4096).astype(int).tolist()


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


@pytest.mark.parametrize("how", [{}, *SETTINGS])
@pytest.mark.parametrize("vocab", [1000, 9000])
def test_a_mask_leaves_only_its_tokens(how, vocab):
    row = np.full(vocab, -np.inf, np.float32)
    row[[3, 9, 700]] = [1, 1, 0.9]
    ids, probabilities = candidates(Sampler(SamplingParams(**how), [3]), row)
    assert {3, 9, 700} >= set(ids[probabilities > 0])
    # Where a filter is on, masked tokens are not even candidates.
    assert len(ids) <= 3 or how == {"temperature": 1.0}


def test_tokens_that_tie_with_the_kth_stay():
    row = logits(2, 5000)
    row[[10, 4999, 300]] = 50
    row[[40, 4000]] = 49
    ids, _ = candidates(Sampler(SamplingParams(1.0, top_k=4)), row)
    assert ids.tolist() == [10, 300, 4999, 40, 4000]
    ids, _ = candidates(Sampler(SamplingParams(1.0, top_k=2)), row)
    assert ids.tolist() == [10, 300, 4999]


def test_a_token_of_no_probability_is_never_drawn(monkeypatch):
    """Not even by the least and the largest number of the stream, when tokens at the ends are
    masked.
    """
    row = logits(0, 3000)
    row[:600] = row[1400:] = -np.inf
    for uniform, expected in ((0.0, 600), (1 - 2**-53, 1399)):
        sampler = Sampler(SamplingParams(1.0, seed=1))
        monkeypatch.setattr(sampler, "_random", SimpleNamespace(random=lambda u=uniform: u))
        assert sampler.sample(row) == expected


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    vocab=st.sampled_from([2, 7, 33, 1500]),
    temperature=st.sampled_from([0.0, 0.4, 1.0, 1.7]),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    repetition=st.sampled_from([1.0, 1.3]),
    bias=st.dictionaries(st.integers(0, 1499), st.floats(-100, 100), max_size=5),
)
def test_what_is_added_is_what_openai_defines(
    seed, vocab, temperature, frequency, presence, repetition, bias
):
    """mu[j] + bias[j] - c[j] * frequency - (c[j] > 0) * presence, c over the answer alone."""
    bias = {token % vocab: value for token, value in bias.items()}
    params = SamplingParams(
        temperature,
        repetition_penalty=repetition,
        seed=seed,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
    )
    prompt = [0, 1, 1]
    sampler, counts = Sampler(params, prompt), np.zeros(vocab, int)
    for step in range(12):
        row = logits(seed + step, vocab)
        scores = row.astype(np.float64)
        seen = sorted({0, 1} | set(np.flatnonzero(counts)))
        scores[seen] *= np.where(scores[seen] < 0, repetition, 1 / repetition)
        scores[list(bias)] += list(bias.values())
        scores -= counts * frequency + (counts > 0) * presence
        before = row.copy()
        found, likeliest = sampler._scores(row)
        np.testing.assert_allclose(found, scores, rtol=1e-12, atol=1e-9)
        token = sampler.sample(row)
        np.testing.assert_array_equal(row, before)
        assert temperature > 0 or token == likeliest
        counts[token] += 1


def test_nothing_added_leaves_the_draws_as_they_are():
    row = logits(6, 700)
    plain = SamplingParams(1.0, seed=3)
    zeros = SamplingParams(1.0, seed=3, frequency_penalty=0, presence_penalty=0, logit_bias={5: 0})
    first, second = Sampler(plain), Sampler(zeros)
    assert [first.sample(row) for _ in range(9)] == [second.sample(row) for _ in range(9)]


def test_a_bias_bans_and_selects_and_brings_no_masked_token_back():
    row = logits(4, 100)
    best, other = int(row.argmax()), int(row.argmin())
    assert Sampler(SamplingParams(1.0, seed=1, logit_bias={other: 100})).sample(row) == other
    ban = Sampler(SamplingParams(1.5, seed=1, logit_bias={best: -100}))
    assert best not in {ban.sample(row) for _ in range(300)}
    row[other] = -np.inf
    assert Sampler(SamplingParams(logit_bias={other: 100})).sample(row) == best


def test_a_frequency_penalty_ends_repetition():
    row = np.array([5.0, 4.0, 3.0, 2.0], np.float32)
    once = Sampler(SamplingParams(presence_penalty=1.5))
    assert [once.sample(row) for _ in range(4)] == [0, 1, 0, 0]
    often = Sampler(SamplingParams(frequency_penalty=1.5))
    assert [often.sample(row) for _ in range(4)] == [0, 1, 0, 2]


def test_a_top_p_of_zero_leaves_the_likeliest():
    row = logits(8, 3000)
    assert {Sampler(SamplingParams(2.0, top_p=0, seed=s)).sample(row) for s in range(9)} == {
        int(row.argmax())
    }


def test_a_bias_outside_the_vocabulary_is_named():
    with pytest.raises(UsageError, match=r"logit_bias: token id 9 is outside 0\.\.8"):
        SamplingParams(logit_bias={2: 1, 9: 1}).check_tokens(9)


@pytest.mark.parametrize("temperature", [1e-300, 1e-4, 1e300])
@pytest.mark.parametrize("rest", [{}, {"top_p": 0.5}, {"min_p": 0.5}, {"min_p": 1.0}, {"top_k": 3}])
def test_extreme_temperatures(temperature, rest):
    row = logits(5, 3000)
    token = Sampler(SamplingParams(temperature, **rest, seed=2)).sample(row)
    if temperature < 1:
        assert token == row.argmax()
    else:
        assert np.isfinite(row[token])


@pytest.mark.parametrize("how", [{}, *SETTINGS])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_raise(bad, how):
    row = logits(0, 9)
    row[4] = bad
    with pytest.raises(ExecutionError, match="NaN"):
        Sampler(SamplingParams(**how), [4]).sample(row)
    with pytest.raises(ExecutionError, match="NaN"):
        Sampler(SamplingParams(**how)).sample(np.full(9, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -4),
        ("seed", True),
        ("frequency_penalty", 2.1),
        ("presence_penalty", "x"),
        ("logit_bias", {-1: 0}),
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
