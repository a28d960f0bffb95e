"""One file into the hub's cache: from where an earlier transfer ended, and checked by its hash
before it counts.

The bytes so far lie beside the blob, under its name and `.incomplete`. One process writes them at a
time.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock

from hmc.errors import HubError
from hmc.hub import cache
from hmc.hub.listing import HubFile, Listing
from hmc.hub.ranges import Stopped, stream

_LONGEST_WAIT_S = 12 * 3600
"""For another process, which fetches the same file."""
_BLOCK = 1 << 22


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def partial(repo: str, file: HubFile) -> Path:
    """Where the bytes of a file are before all of them are there."""
    blob = cache.blob(repo, file.etag)
    return blob.with_name(f"{blob.name}.incomplete")


def transfer(
    listing: Listing, file: HubFile, report: Callable[[int], None], stop: threading.Event
) -> None:
    """Fetch a file; `report` is told how many bytes have come, those of earlier times included.

    Raises `HubError` for what the hub says and for wrong bytes, which are removed, `Stopped` when
    `stop` is set, and `OSError` where the cache cannot be written.
    """
    repo = listing.name.repo
    blob, begun = cache.blob(repo, file.etag), partial(repo, file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _locked(listing, file, stop):
        if blob.exists():  # by now: another process was faster
            report(file.size)
            return
        with begun.open("a+b") as out:
            digest, at = _so_far(out.fileno(), file)
            told = 0
            for chunk in stream(listing, file, at, file.size, stop):
                out.write(chunk)
                digest.update(chunk)
                at += len(chunk)
                if at - told >= _BLOCK:
                    report(at - told)
                    told = at
            report(at - told)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != file.etag:
            begun.unlink()
            raise HubError(
                f"{listing.pinned}: {file.name}: its hash is not {file.etag}, which the hub says:"
                " damaged on the way, or changed there; what came was removed, begin again"
            )
        begun.replace(blob)


def _so_far(descriptor: int, file: HubFile) -> tuple[_Digest, int]:
    """The hash of what is there already, and how much that is; more than the file has counts as
    nothing.
    """
    size = os.fstat(descriptor).st_size
    if size > file.size:
        os.ftruncate(descriptor, 0)
        size = 0
    digest = _digest(file)
    for begin in range(0, size, _BLOCK):
        digest.update(os.pread(descriptor, min(_BLOCK, size - begin), begin))
    return digest, size


def _digest(file: HubFile) -> _Digest:
    """What the hub's hash of a file is made by, told by its length: git's of a blob or SHA-256."""
    if len(file.etag) == 40:
        return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    return hashlib.sha256()


@contextmanager
def _locked(listing: Listing, file: HubFile, stop: threading.Event) -> Iterator[None]:
    path = cache.lock(listing.name.repo, file.etag)
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            with WeakFileLock(path, timeout=1):
                yield
                return
        except Timeout:
            if stop.is_set():
                raise Stopped from None
            if time.monotonic() > deadline:
                raise HubError(
                    f"{listing.pinned}: {file.name}: another process has had {path} locked for"
                    " hours: end it, and begin again"
                ) from None
