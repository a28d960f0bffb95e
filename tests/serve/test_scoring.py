"""Log-probabilities of a prompt over HTTP are those of the engine, as lm-eval's local-completions
asks for them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import openai
import pytest

from hmc.plan import Plan
from hmc.runtime.engine import Engine


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """f64 log-softmax of each row."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echoed_logprobs_are_the_engines(
    client: openai.OpenAI, plan: Plan, model: Path, max_tokens: int
) -> None:
    random = np.random.default_rng(3)
    prompts = [[0, *random.integers(4, 4096, size).tolist()] for size in (1, 37, 200)]
    answer = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=max_tokens, echo=True, logprobs=1, temperature=0
    )
    with Engine(plan, model) as engine:
        for prompt, choice in zip(prompts, answer.choices, strict=True):
            expected = log_softmax(engine.logits(prompt))
            found = choice.logprobs
            assert found is not None and found.token_logprobs is not None
            assert found.top_logprobs is not None
            assert len(found.token_logprobs) == len(prompt) + max_tokens
            assert found.token_logprobs[0] is None
            chosen = expected[np.arange(len(prompt) - 1), prompt[1:]]
            scored = np.array(found.token_logprobs[1 : len(prompt)], float)
            np.testing.assert_allclose(scored, chosen, atol=1e-5)
            best = [max(top.values()) for top in found.top_logprobs[1 : len(prompt)]]
            np.testing.assert_allclose(best, expected[:-1].max(axis=1), atol=1e-5)
