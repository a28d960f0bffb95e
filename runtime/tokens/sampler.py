"""Choosing the next token from a row of logits; hides the order of the filters, their defaults and
the random stream.

The order is that of transformers, and what OpenAI adds to logits follows the penalty that
multiplies them: repetition penalty, logit bias with frequency and presence penalties, temperature,
top-k, top-p, min-p, then one draw. Temperature 0 means greedy: the largest penalised logit, the
lowest id where several are largest. Each sequence owns its random stream, so what a sequence draws
depends on its seed and its logits alone, never on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.errors import ExecutionError, UsageError
from hmc.runtime.tokens.largest import largest, nucleus

Reals = npt.NDArray[np.floating[Any]]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_MOST_PENALTY, _MOST_BIAS = 2, 100  # OpenAI's ranges
_LIKELIEST = 1e-300  # a share that the likeliest token alone reaches
_BLOCK = 512  # weights that are summed at once before a draw


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens; the defaults change nothing about the model's distribution but take its
    mode (greedy).

    temperature         >= 0; 0 is greedy
    top_k               >= 0; 0 is off; tokens that tie with the k-th stay
    top_p               0 <= p <= 1; the smallest set of likeliest tokens whose probability reaches
                        p, of equally likely ones the lowest ids; 1 is off, 0 leaves the likeliest
    min_p               0 <= p <= 1; tokens at least p times as likely as the likeliest; 0 is off
    repetition_penalty  > 0; positive logits of seen tokens (prompt and answer) are divided by it,
                        negative ones multiplied (CTRL, arXiv:1909.05858); 1 is off
    frequency_penalty   -2..2; taken from a token's logit for every time the answer has it
    presence_penalty    -2..2; taken once from the logit of every token that the answer has
                        (both as OpenAI defines them: the prompt does not count); 0 is off
    logit_bias          token id -> -100..100, added to its logit; {} is off
    seed                >= 0, or None for one from the operating system
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `UsageError` naming the argument and its range."""
        _number("temperature", self.temperature, lambda x: x >= 0, "a number >= 0")
        _whole("top_k", self.top_k)
        _number("top_p", self.top_p, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        _number("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        _number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "a number > 0")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _number(name, value, lambda x: abs(x) <= _MOST_PENALTY, "a number in [-2, 2]")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token)
            _number(
                f"logit_bias.{token}",
                bias,
                lambda x: abs(x) <= _MOST_BIAS,
                "a number in [-100, 100]",
            )
        if self.seed is not None:
            _whole("seed", self.seed)

    def check_tokens(self, vocab: int) -> None:
        """Raise `UsageError` for a bias of a token that a vocabulary of `vocab` does not have."""
        if (last := max(self.logit_bias, default=0)) >= vocab:
            raise UsageError(f"logit_bias: token id {last} is outside 0..{vocab - 1}")

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
        if unknown := sorted(set(given) - {each.name for each in fields(SamplingParams)}):
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
        self._said: set[int] = set()
        self._added = dict(params.logit_bias)  # to the logits of these tokens

    @property
    def best(self) -> int:
        """How many of the largest logits the next token is among, whatever the others are: they,
        those that tie with the last of them, and -inf for all others give the same token; 0: it may
        be any.

        Of logits that penalties and biases only lower, as many more: what is not among the k + m
        largest is below k that none of the m penalised tokens has, before and after.
        """
        params, lifted = self._params, any(value > 0 for value in self._added.values())
        if lifted or params.repetition_penalty < 1 or not (params.greedy or params.top_k):
            return 0
        lowered = len(self._seen) if params.repetition_penalty > 1 else 0
        return (1 if params.greedy else params.top_k) + lowered + len(self._added)

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token's id from f32 logits [vocab], remembered as seen.

        Raises `ExecutionError` when the logits hold a NaN or no finite value.
        """
        scores, likeliest = self._scores(logits)
        token = likeliest
        if not self._params.greedy:
            ids, weights = self._survivors(scores, float(scores[likeliest]))
            drawn = _drawn(weights, self._random.random())
            token = drawn if ids is None else int(ids[drawn])
        self._remember(token)
        return token

    def _scores(self, logits: npt.NDArray[np.float32]) -> tuple[Reals, int]:
        """The logits, penalised (and f64 then), and where the first of the largest is."""
        scores: Reals = np.asarray(logits)
        penalty, added = self._params.repetition_penalty, self._added
        if penalty != 1 or added or scores.dtype not in (np.float32, np.float64):
            scores = scores.astype(np.float64)
        if penalty != 1:
            old = scores[self._seen]
            with np.errstate(over="ignore"):
                scores[self._seen] = np.where(old < 0, old * penalty, old / penalty)
        if added:
            tokens = np.fromiter(added, np.int64, len(added))
            scores[tokens] += np.fromiter(added.values(), np.float64, len(added))
        likeliest = int(scores.argmax())  # of a NaN, where there is one
        if not np.isfinite(scores[likeliest]):
            raise ExecutionError("the model's logits hold NaN or infinity: no token can be chosen")
        return scores, likeliest

    def _survivors(self, scores: Reals, peak: float) -> tuple[Ids | None, Floats]:
        """Ids that survive every filter (None: all) and their weights, that of the likeliest 1.

        Exponentials are what takes time: where a filter allows it, only those of a few candidates
        are computed.
        """
        params = self._params
        ids: Ids | None = None
        if params.top_k:
            ids = largest(scores, params.top_k)
        elif params.top_p == 1 and params.min_p > 0:
            # A bit lower than the bound, which is then applied to the weights themselves.
            low = peak + params.temperature * (math.log(params.min_p) - 1e-5)
            low = max(low - 1e-6 * abs(low), float(np.finfo(scores.dtype).min))
            ids = np.flatnonzero(scores >= scores.dtype.type(low))
        with np.errstate(over="ignore", under="ignore"):
            some = scores if ids is None else scores[ids]
            weights: Floats = np.subtract(some, peak, dtype=np.float64)
            if params.temperature != 1:
                weights /= params.temperature
            np.exp(weights, out=weights)
        if params.top_p < 1:
            kept = nucleus(weights, params.top_p or _LIKELIEST)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if params.min_p > 0:
            kept = np.flatnonzero(weights >= params.min_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        return ids, weights

    def _remember(self, token: int) -> None:
        params = self._params
        if params.frequency_penalty or params.presence_penalty:
            once = 0.0 if token in self._said else params.presence_penalty
            self._said.add(token)
            before = self._added.get(token, 0.0)
            self._added[token] = before - once - params.frequency_penalty
        if params.repetition_penalty == 1:
            return
        place = int(np.searchsorted(self._seen, token))
        if place == len(self._seen) or self._seen[place] != token:
            self._seen = np.insert(self._seen, place, token)


def _drawn(weights: Floats, uniform: float) -> int:
    """The position where the running sum of f64 weights [n] passes `uniform` (0 <= uniform < 1) of
    their sum: never one whose weight is 0.

    A running sum costs ten times a plain one, so only that of one block is made.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)))
    target = uniform * sums[-1]
    block = int(np.searchsorted(sums, target, "right"))
    if block:
        target -= sums[block - 1]
    begin = block * _BLOCK
    within = np.cumsum(weights[begin : begin + _BLOCK])
    # Rounding may leave the block's running sum a little below its plain sum: then its last
    # positive weight is meant.
    last = np.searchsorted(within, within[-1])
    return begin + int(min(np.searchsorted(within, target, "right"), last))


def _number(name: str, value: object, valid: Any, text: str) -> None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not valid(value):  # type: ignore[arg-type]
        raise UsageError(f"{name}={value}: must be {text}")


def _whole(name: str, value: object) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise UsageError(f"{name}={value}: must be a whole number >= 0")
