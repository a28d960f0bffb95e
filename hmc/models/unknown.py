"""What is said of a config.json whose model_type no family has: what hmc would have to compute for
it, where that is known; else the family that is nearest to it, and what of it that family would not
read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.jsonfile import first_few
from hmc.errors import HmcError, UnsupportedError
from hmc.models.family import Family

_READ_ELSEWHERE = frozenset(
    "architectures auto_map bos_token_id compression_config dtype eos_token_id ep_size model_type"
    " pad_token_id quantization_config torch_dtype transformers_version"
    " max_position_embeddings".split()
)
_OF_TRAINING = frozenset(
    "attention_dropout aux_loss_alpha embd_pdrop hidden_dropout initializer_range"
    " output_router_logits pretraining_tp resid_pdrop router_aux_loss_coef router_jitter_noise"
    " seq_aux use_cache".split()
)
"""Keys that say nothing of what a model computes."""


LACKING = {
    "qwen4_exp": "embeddings of n-grams, whose rows are hashed from the tokens before, with dilated"
    " convolutions, and an indexer that scores averages of the keys of blocks",
}
"""By model_type, what of a published model hmc does not compute. The nearest family would read
another model, and is not named."""


@dataclass(frozen=True)
class Fit:
    """How well a family fits a configuration: `likeness` of the names, `read` keys that it asked
    for and found, `unread` keys that it did not ask for, and `problem`, what stopped it, or "".
    """

    family: Family
    likeness: float
    read: int
    unread: tuple[str, ...]
    problem: str

    @property
    def score(self) -> float:
        """Larger is nearer. Where a problem stopped the family, it would have read more."""
        share = self.read / max(1, self.read + len(self.unread))
        return 2 * self.likeness + share - (0.25 if self.problem else 0.0)


def unknown_family(config: ModelConfig, families: Mapping[str, Family]) -> UnsupportedError:
    """The error for a model_type that is no family's, for the caller to raise."""
    name = config.require_str("model_type")
    if name in LACKING:
        return UnsupportedError(
            f"{config.path}: model_type {name!r} needs {LACKING[name]}, which hmc does not compute"
        )
    best = max((_fit(name, config.text, each) for each in families.values()), key=_score)
    known = best.family.model_type
    if best.problem:
        detail = f"would stop at: {best.problem}"
    elif best.unread:
        detail = f"does not know {first_few(list(best.unread), 8)} of it"
    else:
        detail = "reads all of it"
    return UnsupportedError(
        f"{config.path}: model_type {name!r} is no family hmc knows; the nearest is {known}, which"
        f" {detail} (--family {known} tries it, hmc models lists all)"
    )


def _score(fit: Fit) -> float:
    return fit.score


class _Asked(Mapping[str, Any]):
    """A configuration's values that remembers which of its keys were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.keys_asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _fit(name: str, config: ModelConfig, family: Family) -> Fit:
    """Build the first layers by the family, and see what it asks for."""
    depth = config.values.get("num_hidden_layers")
    fewer = {"num_hidden_layers": min(depth, 4)} if type(depth) is int else {}
    asked = _Asked({**config.values, **fewer})
    problem = ""
    try:
        with torch.device("meta"):
            family.build(replace(config, values=asked))
            family.aside(replace(config, values=asked))
    except HmcError as error:
        problem = str(error).removeprefix(f"{config.path}: ")
    said = {key for key, value in config.values.items() if value is not None}
    said -= _READ_ELSEWHERE | _OF_TRAINING
    unread = tuple(sorted(said - asked.keys_asked))
    likeness = SequenceMatcher(None, name, family.model_type).ratio()
    return Fit(family, likeness, len(said & asked.keys_asked), unread, problem)
