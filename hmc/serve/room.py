"""Whether a plan finds room beside those that are loaded: of the host and of every GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hmc.machine.detect import available_bytes, memory_limit
from hmc.plan import Plan
from hmc.serve.service import Settings

_HOST = "host"


@dataclass(frozen=True)
class Needs:
    """Bytes that a plan takes of each device, and of the host's those that are taken anew: mapped
    weights lie in the page cache, which may hold them already and may drop them again.
    """

    total: dict[str, int]
    anew: int

    @staticmethod
    def of(plan: Plan, settings: Settings) -> Needs:
        """By the plan's ledger; GPUs that the CPU plays have the host's memory."""
        played = settings.devices == "host"
        total: Counter[str] = Counter()
        mapped = 0
        for item in plan.ledger:
            device = _HOST if played else item.device
            total[device] += item.bytes
            if item.device == _HOST and item.detail == "weights":
                mapped += item.bytes
        own = settings.dummy_weights or settings.home != "mapped"
        return Needs(dict(total), total[_HOST] - (0 if own else mapped))


def lacking(plan: Plan, needs: Needs, loaded: Sequence[Needs] = ()) -> str:
    """What memory is too small for a plan beside those that are loaded; "" when none is. Alone it
    has all memory, else what the others leave, and no more of the host's than is free.
    """
    taken: Counter[str] = Counter()
    for each in loaded:
        taken.update(each.total)
    for device, size in needs.total.items():
        limit = memory_limit() if device == _HOST else plan.machine.memory_of(device)
        if size + taken[device] > limit:
            beside = f" beside {_gib(taken[device])}" if loaded else ""
            return f"{_gib(size)} are needed{beside}, {device} has {_gib(limit)}"
    if loaded and needs.anew > (free := available_bytes()):
        return f"{_gib(needs.anew)} are needed, {_gib(free)} of memory are free"
    return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
