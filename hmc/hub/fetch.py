"""Files of a model into the hub's cache, several at a time; hides which of them are there already,
and how the cache names them.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from huggingface_hub import hf_hub_download

from hmc.errors import HubError
from hmc.hub import cache
from hmc.hub.faults import told
from hmc.hub.listing import HubFile, Listing
from hmc.hub.ranges import Stopped
from hmc.hub.transfer import partial, transfer

_AT_ONCE = 8

Report = Callable[[str, int, int], None]
"""`report(what, done, total)`."""


def missing(listing: Listing, files: Iterable[HubFile]) -> tuple[HubFile, ...]:
    """Those of the files that the cache does not have at this commit."""
    folder = cache.snapshot(listing.name.repo, listing.commit)
    return tuple(file for file in files if not (folder / file.name).exists())


def left(listing: Listing, files: Iterable[HubFile]) -> int:
    """Bytes of files that are still to come."""
    return sum(file.size - _there(listing.name.repo, file) for file in files)


def fetch(listing: Listing, files: Sequence[HubFile], report: Report, what: str) -> None:
    """Bring files into the cache; `report(what, done, total)` in bytes. What was fetched earlier,
    by hmc or by others, is not fetched again, and what was begun is finished.

    Raises `HubError` when there is no room for them, before anything is fetched; and for whatever
    goes wrong with one of them, which ends the others where they are.
    """
    absent = missing(listing, files)
    if not absent:
        return
    try:
        _check_room(listing, absent)
        _fetch(listing, absent, report, what)
    except OSError as error:
        where = cache.storage(listing.name.repo)
        raise HubError(f"{where}: cannot be written: {error.strerror or error}") from error


def _there(repo: str, file: HubFile) -> int:
    for path in (cache.blob(repo, file.etag), partial(repo, file)):
        if path.exists():
            return min(file.size, path.stat().st_size)
    return 0


def _check_room(listing: Listing, files: Sequence[HubFile]) -> None:
    folder = cache.folder()
    exists = next(path for path in (folder, *folder.parents) if path.exists())
    needed, free = left(listing, files), shutil.disk_usage(exists).free
    if needed > free:
        raise HubError(
            f"{listing.name}: {needed / 1e9:.1f} GB are to be fetched, {folder} has"
            f" {free / 1e9:.1f} GB left: make room, or let HF_HOME name another disk"
        )


def _fetch(listing: Listing, files: Sequence[HubFile], report: Report, what: str) -> None:
    stop, lock, done = threading.Event(), threading.Lock(), 0
    total = sum(file.size for file in files)

    def came(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            report(what, done, total)

    def one(file: HubFile) -> None:
        transfer(listing, file, came, stop)
        _name(listing, file)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            ended, _ = wait([pool.submit(one, file) for file in files], None, FIRST_EXCEPTION)
        finally:
            stop.set()  # ends those under way where this was left early
            pool.shutdown(wait=False, cancel_futures=True)
    faults = [fault for each in ended if (fault := each.exception()) is not None]
    for fault in sorted(faults, key=lambda fault: isinstance(fault, Stopped)):
        raise fault


def _name(listing: Listing, file: HubFile) -> None:
    """Let the hub's client give a blob its name in the snapshot, as it does itself."""
    repo, commit = listing.name.repo, listing.commit
    with told(listing.pinned, file.name):
        path = Path(hf_hub_download(repo, file.name, revision=commit, cache_dir=cache.folder()))
    blob = cache.blob(repo, file.etag)
    if blob.exists() and not path.samefile(blob):
        raise HubError(f"{listing.pinned}: {file.name}: changed while it was fetched: begin again")
