"""A rank with a fault, in place of hmc.runtime.ranks.child: `faulty_rank.py FAULT SETUP SOCKET`.

`raise`: the sort of layer 1 raises in rank 1; `hang`: it never ends there; `slow`: every sort takes
a second in every rank.
"""

from __future__ import annotations

import sys
import time

from hmc.plan import Step
from hmc.runtime.device_ops import DEVICE_OPS
from hmc.runtime.device_ops.base import Bound, Work
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.ranks import child as ranks_child


def main(fault: str, arguments: list[str]) -> int:
    sort = DEVICE_OPS["sort"]

    def faulty(bound: Bound, step: Step) -> Work:
        work, chosen = sort(bound, step), step.resource == "gpu1" and step.layer == 1

        def both(call: Call) -> None:
            if fault == "slow":
                time.sleep(1)
            elif chosen and fault == "raise":
                raise ValueError("a fault for a test")
            elif chosen and fault == "hang":
                time.sleep(3600)
            work(call)

        return both

    DEVICE_OPS["sort"] = faulty
    return ranks_child.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
