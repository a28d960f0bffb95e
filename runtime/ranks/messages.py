"""What the process of a rank and rank 0's say to each other; both import it under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError
from hmc.runtime.binding.memory import LentMemory
from hmc.runtime.weights.store import Shared


@dataclass(frozen=True)
class Setup:
    """What a rank needs to begin, left for it in a memory file.

    `phases` names those that the ranks share. `meeting` is the file by which the ranks find each
    other, `seconds` how long one may keep the others waiting, `delays` a seed of the streams'
    random delays (devices played by the CPU).
    """

    weights: Shared
    phases: tuple[str, ...]
    rank: int
    devices: Literal["cuda", "host"]
    threads: int
    meeting: str
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
class Done:
    """The latest `Begin`, `Join` or `Prefill` is done."""


@dataclass(frozen=True)
class At:
    """What the rank's streams are doing."""

    doing: str


@dataclass(frozen=True)
class Failed:
    """The rank cannot begin or go on, and ends. `link`: because the other ranks did not answer."""

    error: HmcError
    link: bool


Command = Begin | Join | Prefill | Where
Report = Done | At | Failed
