"""Blocks that several processes map: memory files, handed over by descriptor; hides memfd and
pools of huge pages.

A memory file has no name: it is gone with the last process that has it open or mapped, however that
process ends, and leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref

from hmc.errors import CapacityError, ExecutionError
from hmc.machine.detect import free_huge_pages, huge_by_advice
from hmc.runtime.memory.blocks import HUGE_PAGE, Block, Pages

_MAP_NORESERVE = 0x4000
_MFD_HUGE_2MB = 21 << 26
_HUGETLBFS = 0x958458F6
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_FAILED = ctypes.c_void_p(-1).value

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]


class SharedBlock(Block):
    """A `Block` in a memory file. `descriptor` is given to other processes (inherited, sent, or
    opened as /proc/<pid>/fd/<descriptor>), which `attach` it; each closes its own.
    """

    descriptor: int

    def __init__(self, size: int, purpose: str) -> None:
        """A new file of zeros, out of reserved huge pages where enough are free. `CapacityError`
        naming `purpose` when it cannot be made.
        """
        self._take(size, purpose)
        if self.span <= free_huge_pages() * HUGE_PAGE and self._create("reserved"):
            return
        self._create("advised" if huge_by_advice("shmem_enabled") else "normal")

    @classmethod
    def attach(
        cls, descriptor: int, size: int, purpose: str, *, write: bool = False
    ) -> SharedBlock:
        """The file behind `descriptor` (which stays the caller's), to be read or also written.

        `ExecutionError` when it does not hold `size` bytes.
        """
        block = cls.__new__(cls)
        block._take(size, purpose)
        try:
            found = os.fstat(descriptor).st_size
            if found != block.span:
                raise ExecutionError(
                    f"{purpose}: the memory file has {found:,} bytes, {block.span:,} are expected"
                )
            block._own(os.dup(descriptor))
            block.pages = _pages(descriptor)
        except OSError as error:
            raise ExecutionError(
                f"{purpose}: descriptor {descriptor} is no memory file: {error.strerror}"
            ) from error
        block._place(block.pages, write)
        return block

    def _create(self, pages: Pages) -> bool:
        """Make and map the file; False when the reserved huge pages went to somebody else."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if pages == "reserved":
            flags |= os.MFD_HUGETLB | _MFD_HUGE_2MB
        try:
            self._own(os.memfd_create(f"hmc {self.purpose}"[:200], flags))
            os.ftruncate(self.descriptor, self.span)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._place(pages, write=True)
        except OSError as error:
            if pages == "reserved" and error.errno == errno.ENOMEM:
                self._release()
                return False
            raise CapacityError(
                f"{self.purpose}: {self.size / 2**30:.2f} GiB of shared memory cannot be had:"
                f" {error.strerror}"
            ) from error
        self.pages = pages
        return True

    def _own(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._release = weakref.finalize(self, os.close, descriptor)

    def _place(self, pages: Pages, write: bool) -> None:
        """Map the file over the block's address space."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        # Reserved pages are set aside here, so that no later touch can fail for want of them.
        lazily = 0 if pages == "reserved" else _MAP_NORESERVE
        self._map_over(protection, mmap.MAP_SHARED | lazily, self.descriptor)
        if pages == "advised":
            self._map.madvise(mmap.MADV_HUGEPAGE, self._start, self.span)
        self.array.flags.writeable = write

    def _map_over(self, protection: int, flags: int, descriptor: int) -> None:
        fixed = 0x10  # MAP_FIXED: what was there is replaced, and nothing can come in between
        found = libc.mmap(self.address, self.span, protection, flags | fixed, descriptor, 0)
        if found == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _drop(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map_over(mmap.PROT_READ | mmap.PROT_WRITE, flags, -1)
        self._release()


def _pages(descriptor: int) -> Pages:
    status = (ctypes.c_long * 32)()  # struct statfs begins with the kind of file system
    if libc.fstatfs(descriptor, status):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if status[0] == _HUGETLBFS:
        return "reserved"
    return "advised" if huge_by_advice("shmem_enabled") else "normal"
