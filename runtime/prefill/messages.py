"""What a prefill process and its parent say to each other; both sides import it under one name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError


@dataclass(frozen=True)
class Setup:
    """What the process needs to begin, left for it in a memory file; descriptors as it has them.

    `plan` is the plan's JSON. `weights` is the arena, None for shards it maps itself from
    `directory`.
    """

    plan: str
    directory: str | None
    weights: int | None
    cache: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """Prefill i32 `ids` after `past` tokens of a sequence that has these cache blocks."""

    job: int
    blocks: tuple[int, ...]
    past: int
    ids: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Cancel:
    """Answered by `Ended`, unless the job is over."""

    job: int


@dataclass(frozen=True)
class Ready:
    """The process takes jobs."""


@dataclass(frozen=True)
class Refused:
    """The process cannot begin, and ends."""

    error: HmcError


@dataclass(frozen=True)
class Advanced:
    """So many tokens of the job are in the cache."""

    job: int
    tokens: int


@dataclass(frozen=True)
class Finished:
    """All of them are; f32 [vocab] logits of the last one."""

    job: int
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ended:
    """The job ended early and writes nothing any more: cancelled (None) or failed."""

    job: int
    error: HmcError | None


Report = Ready | Refused | Advanced | Finished | Ended
