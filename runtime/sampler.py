"""Choosing the next token from a row of logits; hides the order of the filters, their defaults and
the random stream.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p, then one
draw. Temperature 0 means greedy: the largest penalised logit, the lowest id where several are
largest. Each sequence owns its random stream, so what a sequence draws depends on its seed and its
logits alone, never on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.errors import ExecutionError, UsageError

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_FIRST_CANDIDATES = 1024  # top-p looks at this many tokens before it sorts more


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens; the defaults change nothing about the model's distribution but take its
    mode (greedy).

    temperature         >= 0; 0 is greedy top_k               >= 0; 0 is off; tokens that tie with
    the k-th stay top_p               0 < p <= 1; the smallest set of likeliest tokens whose
    probability reaches p; 1 is off min_p               0 <= p <= 1; tokens at least p times as
    likely as the likeliest; 0 is off repetition_penalty  > 0; positive logits of seen tokens
    (prompt and answer) are divided by it, negative ones
                        multiplied (CTRL, arXiv:1909.05858); 1 is off
    seed                >= 0, or None for one from the operating system
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` naming the argument and its range."""
        _number("temperature", self.temperature, lambda x: x >= 0, "a number >= 0")
        _whole("top_k", self.top_k)
        _number("top_p", self.top_p, lambda x: 0 < x <= 1, "a number in (0, 1]")
        _number("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        _number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "a number > 0")
        if self.seed is not None:
            _whole("seed", self.seed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @staticmethod
    def resolve(
        explicit: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """Explicit values over those of generation_config.json over the defaults; None counts as
        not given.

        Without an explicit temperature the file's `do_sample` decides between greedy and sampling,
        except that an explicit top_k, top_p or min_p asks for sampling too (at the file's
        temperature, or 1).
        """
        config = generation_config or {}
        given = {name: value for name, value in explicit.items() if value is not None}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        if unknown := sorted(set(given) - {*names, "seed"}):
            raise UsageError(f"{unknown[0]}: no such sampling argument")
        values = {name: config[name] for name in names if config.get(name) is not None}
        values |= given
        if "temperature" not in given:
            asked = any(name in given for name in ("top_k", "top_p", "min_p"))
            sample = asked or bool(config.get("do_sample"))
            values["temperature"] = values.get("temperature", 1.0) if sample else 0.0
        return SamplingParams(**values)


class Sampler:
    """The choices of one sequence: remembers which tokens it has seen and where its random stream
    stands.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self._params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._seen = np.unique(np.asarray(prompt_ids, dtype=np.int64))

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token's id from f32 logits [vocab], remembered as seen.

        Raises `ExecutionError` when the logits hold a NaN or no finite value.
        """
        ids, probabilities = self.candidates(logits)
        token = int(ids[0])
        if not self._params.greedy:
            cumulative = np.cumsum(probabilities)
            drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], "right")
            token = int(ids[min(int(drawn), len(ids) - 1)])
        if self._params.repetition_penalty != 1:
            self._seen = np.union1d(self._seen, [token])
        return token

    def candidates(self, logits: npt.NDArray[np.float32]) -> tuple[Ids, Floats]:
        """Ids that survive every filter, likeliest first unless no filter is on, and their f64
        probabilities (sum 1).
        """
        params = self._params
        scores = np.asarray(logits, dtype=np.float64)
        if not np.isfinite(scores.max()):  # a NaN anywhere makes the maximum NaN
            raise ExecutionError("the model's logits hold NaN or infinity: no token can be chosen")
        if params.repetition_penalty != 1:
            scores = _penalised(scores, self._seen, params.repetition_penalty)
        if params.greedy:
            return np.array([np.argmax(scores)]), np.ones(1)
        weights = np.exp((scores - scores.max()) / params.temperature)
        ids = np.arange(len(weights))
        if params.top_k:
            ids = _top_k(weights, params.top_k)
        if params.top_p < 1:
            ids = _top_p(ids, weights, params.top_p)
        if params.min_p > 0:
            ids = ids[weights[ids] >= params.min_p * weights[ids].max()]
        chosen = weights[ids]
        return ids, chosen / chosen.sum()


def _penalised(scores: Floats, seen: Ids, penalty: float) -> Floats:
    old = scores[seen]
    scores = scores.copy()
    scores[seen] = np.where(old < 0, old * penalty, old / penalty)
    return scores


def _top_k(weights: Floats, k: int) -> Ids:
    """Ids of the k largest weights and of those that tie with the k-th, largest first."""
    if k >= len(weights):
        return _by_weight(np.arange(len(weights)), weights)
    smallest = np.partition(weights, -k)[-k]
    return _by_weight(np.flatnonzero(weights >= smallest), weights)


def _top_p(ids: Ids, weights: Floats, p: float) -> Ids:
    """The shortest run of `ids`, likeliest first, whose share of the weight is at least p.

    A vocabulary has 10^5 tokens and the run is short as a rule, so only as many are sorted as are
    needed.
    """
    target = p * weights[ids].sum()
    count = min(_FIRST_CANDIDATES, len(ids))
    while True:
        first = ids[np.argpartition(-weights[ids], count - 1)[:count]]
        first = _by_weight(first, weights)
        cumulative = np.cumsum(weights[first])
        if cumulative[-1] >= target or count == len(ids):
            return first[: int(np.searchsorted(cumulative, target)) + 1]
        count = min(8 * count, len(ids))


def _by_weight(ids: Ids, weights: Floats) -> Ids:
    return ids[np.lexsort((ids, -weights[ids]))]


def _number(name: str, value: object, valid: Any, text: str) -> None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not valid(value):  # type: ignore[arg-type]
        raise UsageError(f"{name}={value}: must be {text}")


def _whole(name: str, value: object) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise UsageError(f"{name}={value}: must be a whole number >= 0")
