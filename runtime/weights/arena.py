"""The memory file that holds a plan's weights once for all processes; hides its header.

[0, 4096)   magic, then JSON: digest of what it holds, bytes, home; written last, so a file
            without it was never filled
[4096, )    tensors as `tensors.layout` places them
"""

from __future__ import annotations

import json
import mmap
from typing import Any

from hmc.errors import ExecutionError, PlanMismatchError
from hmc.plan import Plan
from hmc.runtime.memory.blocks import HUGE_PAGE
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.weights.tensors import weights_digest

HEADER = 4096
_MAGIC = b"hmc weights 1\n"


def keep(block: SharedBlock, plan: Plan, home: str) -> None:
    """All tensors are in place: others may attach from now on."""
    about = {"digest": weights_digest(plan), "bytes": block.size, "home": home}
    text = _MAGIC + json.dumps(about).encode() + b"\n"
    block.array[: len(text)] = memoryview(text)


def attach(plan: Plan, size: int, descriptor: int) -> tuple[SharedBlock, str]:
    """A file of `size` bytes that another process filled and kept, to be read, and where its bytes
    came from; see `WeightStore.attach`."""
    header = _header_of(descriptor)
    if header["digest"] != weights_digest(plan):
        raise PlanMismatchError(
            "the weight arena was filled for other weights than the plan's: start the process"
            " that holds it with the same checkpoint and plan"
        )
    return SharedBlock.attach(descriptor, size, "weight arena"), header["home"]


def _header_of(descriptor: int) -> dict[str, Any]:
    """What `keep` wrote; `ExecutionError` when that never happened. (Read through a mapping: files
    of huge pages cannot be read otherwise on older kernels.)
    """
    try:
        with mmap.mmap(descriptor, HUGE_PAGE, prot=mmap.PROT_READ) as start:
            raw = start[:HEADER]
    except (OSError, ValueError) as error:
        raise ExecutionError(f"descriptor {descriptor} is no weight arena: {error}") from error
    if not raw.startswith(_MAGIC):
        raise ExecutionError(f"the weight arena of descriptor {descriptor} was never filled")
    found: dict[str, Any] = json.loads(raw[len(_MAGIC) :].split(b"\n", 1)[0])
    return found
