"""The memory file that holds a plan's weights once for all processes; hides its header.

[0, 4096)   magic, then JSON: digest of what it holds, bytes, home; written last, so a file
            without it was never filled
[4096, )    tensors as `tensors.layout` places them
"""

from __future__ import annotations

import json
import mmap
from types import TracebackType
from typing import Any

from hmc.errors import CapacityError, ExecutionError, PlanMismatchError
from hmc.machine.detect import available_bytes, free_huge_pages
from hmc.plan import Plan
from hmc.runtime.memory.blocks import HUGE_PAGE, Pages, aligned
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.weights.tensors import Addresses, Key, TensorGroup, layout, weights_digest

_HEADER = 4096
_MAGIC = b"hmc weights 1\n"


class WeightArena:
    """`places` are the addresses of every tensor; `home` says where the bytes came from ("shared":
    the checkpoint, or "dummy"). In a `with`, closed at its end unless `keep` was called.
    """

    def __init__(self, block: SharedBlock, groups: list[TensorGroup], home: str) -> None:
        offsets, _ = layout(groups)
        start = block.address + _HEADER
        self.places: dict[Key, Addresses] = {key: start + at for key, at in offsets.items()}
        self.home = home
        self._block = block
        self._digest = ""

    @classmethod
    def create(cls, plan: Plan, groups: list[TensorGroup], home: str) -> WeightArena:
        """An empty arena to be filled; `CapacityError` when the memory free now is too small."""
        size = _size(groups)
        free = available_bytes()
        reserved = free_huge_pages() * HUGE_PAGE
        if size > free and aligned(size, HUGE_PAGE) > reserved:
            raise CapacityError(
                f"{home} weights: {size / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB of"
                f" memory and {reserved / 2**30:.1f} GiB of reserved huge pages are free: run fewer"
                " layers, or on a machine with more memory"
            )
        arena = cls(SharedBlock(size, f"{home} weights"), groups, home)
        arena._digest = weights_digest(plan)
        return arena

    @classmethod
    def attach(cls, plan: Plan, groups: list[TensorGroup], descriptor: int) -> WeightArena:
        """An arena that is filled; see `WeightStore.attach`."""
        expected = weights_digest(plan)
        header = _header_of(descriptor)
        if header["digest"] != expected:
            raise PlanMismatchError(
                "the weight arena was filled for other weights than the plan's: start the process"
                " that holds it with the same checkpoint and plan"
            )
        block = SharedBlock.attach(descriptor, _size(groups), "weight arena")
        return cls(block, groups, header["home"])

    @property
    def descriptor(self) -> int:
        """What other processes attach."""
        return self._block.descriptor

    @property
    def pages(self) -> Pages:
        """What the arena is made of."""
        return self._block.pages

    @property
    def span(self) -> tuple[int, int]:
        """Address and bytes of the whole, to be pinned."""
        return self._block.address, self._block.size

    @property
    def writeable(self) -> bool:
        """Whether this process may write it: it was created here, not attached."""
        return bool(self._block.array.flags.writeable)

    def lock(self) -> None:
        """Keep it in memory; `MachineError` where the limit on locked memory refuses."""
        self._block.lock()

    def keep(self) -> None:
        """All tensors are in place: others may attach from now on."""
        about = {"digest": self._digest, "bytes": self._block.size, "home": self.home}
        text = _MAGIC + json.dumps(about).encode() + b"\n"
        self._block.array[: len(text)] = memoryview(text)

    def close(self) -> None:
        """Let go of it; the memory is free when no process has it any more."""
        self._block.close()

    def __enter__(self) -> WeightArena:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.close()


def _size(groups: list[TensorGroup]) -> int:
    _, total = layout(groups)
    return _HEADER + total


def _header_of(descriptor: int) -> dict[str, Any]:
    """What `keep` wrote; `ExecutionError` when that never happened. (Read through a mapping: files
    of huge pages cannot be read otherwise on older kernels.)
    """
    try:
        with mmap.mmap(descriptor, HUGE_PAGE, prot=mmap.PROT_READ) as start:
            raw = start[:_HEADER]
    except (OSError, ValueError) as error:
        raise ExecutionError(f"descriptor {descriptor} is no weight arena: {error}") from error
    if not raw.startswith(_MAGIC):
        raise ExecutionError(f"the weight arena of descriptor {descriptor} was never filled")
    found: dict[str, Any] = json.loads(raw[len(_MAGIC) :].split(b"\n", 1)[0])
    return found
