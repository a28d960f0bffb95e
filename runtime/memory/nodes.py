"""Memory of NUMA nodes: threads that take pages from one, blocks that stay where they are or are
spread over several, and where pages lie; hides the kernel's system calls.

Nothing here is called on machines of one node. Containers often forbid the calls: a
`NotAllowedError` says so, and pages then lie on the node of who touches them first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

_MBIND, _SET_MEMPOLICY, _MOVE_PAGES = 237, 238, 279  # x86-64
_PREFERRED, _BIND, _INTERLEAVE = 1, 2, 3
_MADV_POPULATE_WRITE = 23
_MASK_BITS = 1024

_libc = ctypes.CDLL(None, use_errno=True)


class NotAllowedError(Exception):
    """The kernel does not allow a call, or does not know it; says which and why."""


def take_from(node: int, *, strictly: bool) -> None:
    """Pages that this thread touches first, and the page cache that it fills, come from a node:
    `strictly`, even if cached files must make room, else as far as there is memory that is free."""
    mode = _BIND if strictly else _PREFERRED
    _call("set_mempolicy", _SET_MEMPOLICY, ctypes.c_int(mode), _mask([node]), ctypes.c_ulong(_BITS))


def hold(address: int, size: int, nodes: Collection[int]) -> None:
    """The pages of [address, + size) stay on the nodes they are on: the kernel's balancing leaves
    memory alone that is bound. What is touched later comes from the toucher's node, or another of
    `nodes`."""
    _mbind(address, size, _BIND, nodes)


def spread(address: int, size: int, nodes: Collection[int]) -> None:
    """Pages of [address, + size) that are touched from now on come from the `nodes` by turns."""
    _mbind(address, size, _INTERLEAVE, nodes)


def refusal(node: int) -> str:
    """Why memory cannot be bound to a node here; "" where it can."""
    page = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint8)
    try:
        hold(page.ctypes.data, mmap.PAGESIZE, [node])
    except NotAllowedError as why:
        return str(why)
    return ""


def populate(address: int, size: int) -> None:
    """Touch all pages of [address, + size), which nobody has written to yet, in this thread."""
    span = ctypes.c_void_p(address), ctypes.c_size_t(size)
    if _libc.madvise(*span, ctypes.c_int(_MADV_POPULATE_WRITE)):
        ctypes.memset(address, 0, size)  # kernels before 5.14; or what is wrong strikes here


def huge(address: int, size: int, wanted: bool) -> None:
    """Ask for huge pages in [address, + size), or for pages of 4 KiB."""
    advice = mmap.MADV_HUGEPAGE if wanted else mmap.MADV_NOHUGEPAGE
    if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice)):
        number = ctypes.get_errno()
        raise OSError(number, f"madvise: {os.strerror(number)}")


def where(addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The node of the page at each address; negative (-errno) for one that is not there."""
    pages, found = np.ascontiguousarray(addresses), np.zeros(len(addresses), np.int32)
    count = ctypes.c_ulong(len(pages))
    into = (ctypes.c_void_p(each.ctypes.data) for each in (pages, found))
    first, last = into
    _call("move_pages", _MOVE_PAGES, ctypes.c_int(0), count, first, None, last, ctypes.c_int(0))
    return found


def _mbind(address: int, size: int, mode: int, nodes: Collection[int]) -> None:
    span = ctypes.c_void_p(address), ctypes.c_ulong(size)
    mask, bits = _mask(nodes), ctypes.c_ulong(_BITS)
    _call("mbind", _MBIND, *span, ctypes.c_int(mode), mask, bits, ctypes.c_uint(0))


_BITS = _MASK_BITS + 1  # the kernel takes one off


def _mask(nodes: Collection[int]) -> ctypes.Array[ctypes.c_ulong]:
    words = (ctypes.c_ulong * (_MASK_BITS // 64))()
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    return words


def _call(name: str, number: int, *arguments: object) -> None:
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        error = ctypes.get_errno()
        raise NotAllowedError(f"{name} is not allowed here ({os.strerror(error)})")
