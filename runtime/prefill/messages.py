"""What a prefill process and its parent say to each other; both sides import it under one name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError
from hmc.plan import Stop
from hmc.runtime.weights.store import Shared


@dataclass(frozen=True)
class Setup:
    """What the process needs to begin, left for it in a memory file; `cache` is the descriptor of
    the KV cache as it has it."""

    weights: Shared
    cache: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """Prefill i32 `ids` after `past` tokens of a sequence in a `row` of the cache that has these
    blocks; what was started before is over. Its states after some numbers of tokens are to be
    copied to slots for `snapshots`, before more is reported."""

    row: int
    blocks: tuple[int, ...]
    past: int
    ids: npt.NDArray[np.int32]
    snapshots: tuple[tuple[Stop, int], ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Answered by a `Report` that ends the prompt, unless it is over."""


@dataclass(frozen=True)
class Ready:
    """The process takes prompts; with an `error` it cannot begin, and ends."""

    error: HmcError | None = None


@dataclass(frozen=True)
class Report:
    """So many tokens of the prompt are in the cache. With f32 [vocab] `logits` of the last one, all
    are; with an `error` it ended early and nothing is written any more."""

    tokens: int
    logits: npt.NDArray[np.float32] | None = None
    error: HmcError | None = None
