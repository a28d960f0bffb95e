"""Log-probabilities against the definition in f64."""

import numpy as np
import pytest

from hmc.runtime.tokens.requests import token_logprob


@pytest.mark.parametrize("vocab", [3, 500, 129_280])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_logprobs_are_the_log_softmax(vocab, top):
    row = (np.random.default_rng(vocab).standard_normal(vocab) * 3).astype(np.float32)
    row[[0, 2]] = row.max() + 1  # a tie
    exact = row.astype(np.float64) - row.max()
    exact -= np.log(np.exp(exact).sum())
    before = row.copy()
    result = token_logprob(row, 1, top)
    assert result.token == 1
    assert result.logprob == pytest.approx(exact[1], abs=2e-6)
    expected = np.argsort(-exact, kind="stable")[:top]
    assert [token for token, _ in result.top] == expected.tolist()
    np.testing.assert_allclose([value for _, value in result.top], exact[expected], atol=2e-6)
    np.testing.assert_array_equal(row, before)


def test_forbidden_tokens_are_not_among_the_likeliest():
    row = np.array([-np.inf, 1, -np.inf, 1], np.float32)
    result = token_logprob(row, 1, 4)
    assert [token for token, _ in result.top] == [1, 3]
    assert result.logprob == pytest.approx(-np.log(2))
