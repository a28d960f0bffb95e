"""What a scheduler is asked for and what it answers: requests, updates and tickets; hides the
hand-over between the thread that computes and those that wait.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.errors import ContextLengthError, HmcError, UsageError
from hmc.runtime.tokens.generation import Ends, FinishReason, Generation, Timings
from hmc.runtime.tokens.largest import largest
from hmc.runtime.tokens.sampler import Sampler
from hmc.runtime.tokens.text import Text

Mask = Callable[[list[int]], npt.NDArray[np.bool_] | None]
"""Tokens generated so far -> bool [vocab] of the tokens allowed next, or None for all."""


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability by the model's own logits (before penalty,
    temperature, filters and mask), and the likeliest tokens with theirs, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Update:
    """What has become known of a request since its last update; the one with a `finish_reason` is
    the last.

    One update a token as a rule: `piece` is the text that became certain with it. `logprobs` has
    one entry a token if they were asked for. `prompt_logprobs` comes once, with the first update:
    one entry for every prompt token after the first. `cached_tokens` prompt tokens came from the
    prefix cache. `timings` and, after a failure, `error` come with the last update.
    """

    piece: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    error: HmcError | None = None
    cached_tokens: int = 0
    timings: Timings | None = None


Listener = Callable[[Update], None]


@dataclass
class Request:
    """One prompt to be continued; `sampler` and `ends` remember what they have seen, so a request
    is submitted once.

    ids               i32 [tokens], at least one
    text              turns tokens into text and finds stop strings; None: no text
    logprobs          how many likeliest tokens are wanted with each token; 0: the chosen one alone
    prompt_logprobs   also for the prompt, as many as `logprobs`; nothing is taken from the prefix
                      cache then. With max_new_tokens 0 the prompt is scored and that is all
    mask              asked once before each sample, in any thread: while the model computes
    listener          told every update, in the scheduler's thread: it must not block. If it raises,
                      the request ends with that error and the listener is not called again
    """

    ids: npt.NDArray[np.int32]
    sampler: Sampler
    ends: Ends
    text: Text | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    mask: Mask | None = None
    listener: Listener | None = None


class Ticket:
    """A submitted request, for any thread: `id` counts from 0 in the order of submission,
    `cancelled` says whether somebody has asked to end it early, `done` whether it has ended, in
    whatever way."""

    def __init__(self, number: int, wake: Callable[[], None]) -> None:
        """`wake` tells the scheduler that something has been cancelled."""
        self.id = number
        self.cancelled = False
        self.done = False
        self._wake = wake
        self._claim = threading.Lock()
        self._answer: Future[Generation] = Future()

    def cancel(self) -> None:
        """End the request within one step; nothing happens to one that has ended."""
        self.cancelled = True
        self._wake()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for as long as it takes); whether it has ended."""
        return bool(wait([self._answer], timeout).done)

    def result(self) -> Generation:
        """What was generated, once it has ended (waits for that: the scheduler ends what it
        accepted); raises the error it ended with."""
        return self._answer.result()

    def claim(self) -> bool:
        """For the scheduler: whether the caller is the one to end the request (true once)."""
        return self._claim.acquire(blocking=False)

    def settle(self, generation: Generation, error: HmcError | None) -> None:
        """For the scheduler, after `claim`: wake those who wait."""
        self.done = True
        if error is not None:
            self._answer.set_exception(error)
        else:
            self._answer.set_result(generation)


def token_ids(
    ids: Items[int] | npt.NDArray[np.int32], vocab: int, context: int
) -> npt.NDArray[np.int32]:
    """A prompt as i32 [tokens].

    Raises `UsageError` when it is empty, no list of whole numbers or outside 0..vocab-1, and
    `ContextLengthError` when it is longer than the context.
    """
    if len(ids) == 0:
        raise UsageError("the prompt is empty: give at least one token")
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError("token ids must be a list of whole numbers")
    wrong = np.flatnonzero((array < 0) | (array >= vocab))
    if len(wrong):
        at = int(wrong[0])
        raise UsageError(
            f"token id {array[at]} at place {at} of the prompt is outside the vocabulary:"
            f" 0..{vocab - 1}"
        )
    if len(array) > context:
        raise ContextLengthError(
            f"the prompt has {len(array)} tokens, the plan's context holds {context}:"
            " shorten it or compile with a larger --max-context"
        )
    return array.astype(np.int32)


def token_logprob(logits: npt.NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Log-softmax of f32 logits [vocab] at `token`, and the `top` likeliest tokens with theirs; of
    equally likely ones the lowest id comes first.
    """
    peak = logits.max()
    # f32 exponentials summed in f64: exact to about 1e-7, and half the time of f64 throughout.
    weights = logits - peak
    np.exp(weights, out=weights)
    normaliser = float(peak) + math.log(weights.sum(dtype=np.float64))
    ids = largest(logits, top) if top else np.empty(0, np.int64)
    ids = ids[np.lexsort((ids, -logits[ids]))][:top]
    likeliest = tuple((int(i), float(logits[i]) - normaliser) for i in ids)
    return TokenLogprob(token, float(logits[token]) - normaliser, likeliest)
