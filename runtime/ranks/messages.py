"""What the process of a rank and rank 0's say to each other; both import it under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError
from hmc.runtime.binding.memory import LentMemory
from hmc.runtime.device_ops.traffic import Counts


@dataclass(frozen=True)
class Setup:
    """What a rank needs to begin, left for it in a memory file; descriptors as it has them.

    `plan` is the plan's JSON, `phases` names those that the ranks share. `weights` is the arena,
    None for shards it maps itself from `directory`. `store` is the file by which the ranks find
    each other, `seconds` how long one may keep the others waiting, `delays` a seed of the streams'
    random delays (devices played by the CPU).
    """

    plan: str
    directory: str | None
    weights: int | None
    phases: tuple[str, ...]
    rank: int
    devices: Literal["cuda", "host"]
    threads: int
    store: str
    seconds: float
    delays: int | None


@dataclass(frozen=True)
class Begin:
    """Get ready, with the memory of each rank's GPU that rank 0 has."""

    memory: Mapping[int, LentMemory]


@dataclass(frozen=True)
class Join:
    """Every rank is ready: connect."""


@dataclass(frozen=True)
class Prefill:
    """Compute your part of a call of a phase: i32 `ids` after `past` tokens of a sequence."""

    phase: str
    ids: npt.NDArray[np.int32]
    past: int


@dataclass(frozen=True)
class Where:
    """Answered by `At` at any time."""


@dataclass(frozen=True)
class Ready:
    """Weights and memory are there."""


@dataclass(frozen=True)
class Joined:
    """The rank is connected to the others and takes calls."""


@dataclass(frozen=True)
class At:
    """What the rank's streams are doing."""

    doing: str


@dataclass(frozen=True)
class Done:
    """The rank's part of the call is done; bytes it sent in it."""

    counts: Counts


@dataclass(frozen=True)
class Failed:
    """The rank cannot begin or go on, and ends. `link`: because the other ranks did not answer."""

    error: HmcError
    link: bool


Command = Begin | Join | Prefill | Where
Report = Ready | Joined | At | Done | Failed
