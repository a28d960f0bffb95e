"""Log-probabilities of tokens from logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmc.runtime.requests import TokenLogprob

Floats = npt.NDArray[np.float32]


def token_logprob(logits: Floats, token: int, top: int) -> TokenLogprob:
    """Log-softmax of f32 logits [vocab] at `token`, and the `top` likeliest tokens with theirs; of
    equally likely ones the lowest id comes first.
    """
    peak = logits.max()
    # f32 exponentials summed in f64: exact to about 1e-7, and half the time of f64 throughout.
    normaliser = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    likeliest = tuple((int(i), float(logits[i]) - normaliser) for i in _largest(logits, top))
    return TokenLogprob(token, float(logits[token]) - normaliser, likeliest)


def _largest(logits: Floats, count: int) -> npt.NDArray[np.int64]:
    count = min(count, len(logits))
    if count == 0:
        return np.empty(0, np.int64)
    smallest = np.partition(logits, -count)[-count]
    ids = np.flatnonzero(logits >= smallest)
    return ids[np.lexsort((ids, -logits[ids]))][:count]
