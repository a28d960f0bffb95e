"""What a prefill process and its parent say to each other; both sides import it under one name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.errors import ExecutionError, HmcError


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
    """Answered by a `Report` that ends the job, unless it is over."""

    job: int


@dataclass(frozen=True)
class Ready:
    """The process takes jobs; with an `error` it cannot begin, and ends."""

    error: HmcError | None = None


@dataclass(frozen=True)
class Report:
    """So many tokens of the job are in the cache. With f32 [vocab] `logits` of the last one, all
    are; with an `error` the job ended early and writes nothing any more."""

    job: int
    tokens: int
    logits: npt.NDArray[np.float32] | None = None
    error: HmcError | None = None


def cancelled() -> HmcError:
    """The error of a job that was cancelled."""
    return ExecutionError("the prefill was cancelled")
