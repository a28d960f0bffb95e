"""What a model of the hub holds at one commit: names, sizes and hashes of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import httpx2
from huggingface_hub import HfApi, constants, is_offline_mode

from hmc.errors import HubError
from hmc.hub import cache
from hmc.hub.faults import no_hub, told
from hmc.hub.names import HubName, is_inside


@dataclass(frozen=True)
class HubFile:
    """A file: its path in the model, its size in bytes, and what it is kept under in the cache: the
    SHA-256 of what it holds (64 hex digits), or of small ones the hash that git has for it (40).
    """

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class Listing:
    """The files of a model at one commit, by name. `unasked` says why the hub was not asked, where
    these are only what the cache has.
    """

    name: HubName
    commit: str
    files: Mapping[str, HubFile]
    unasked: str = ""

    @property
    def pinned(self) -> HubName:
        """The same files under a name that cannot come to mean others."""
        return replace(self.name, revision=self.commit)


def look_up(name: HubName) -> Listing:
    """Ask the hub for a model, or the cache where the hub may not (HF_HUB_OFFLINE) or cannot be
    asked and the cache knows the revision.

    Raises `HubError` for a model or a revision that is not there, or not for everybody.
    """
    if is_offline_mode():
        return _cached(name, "HF_HUB_OFFLINE is set")
    with told(name):
        try:
            info = HfApi().model_info(
                name.repo,
                revision=name.revision or None,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except httpx2.TransportError as error:
            if cache.known_commit(name.repo, name.revision) is None:
                raise
            return _cached(name, f"{constants.ENDPOINT} cannot be reached ({error})")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(f"{name}: {no_hub(repr(error))}") from error
    if not cache.is_commit(info.sha or "") or info.siblings is None:
        raise HubError(f"{name}: {no_hub('it names no commit')}")
    files = {}
    for each in info.siblings:
        etag = each.lfs.sha256 if each.lfs else each.blob_id
        if not is_inside(each.rfilename):
            raise HubError(f"{name}: {no_hub(f'it has a file {each.rfilename!r}')}")
        if each.size is None or not cache.is_etag(etag or ""):
            raise HubError(f"{name}: {no_hub(f'it has no hash of {each.rfilename}')}")
        files[each.rfilename] = HubFile(each.rfilename, each.size, str(etag))
    commit = str(info.sha)
    cache.remember(name.repo, name.revision, commit)
    return Listing(name, commit, files)


def _cached(name: HubName, why: str) -> Listing:
    """What the cache has of a model."""
    commit = cache.known_commit(name.repo, name.revision)
    folder = cache.snapshot(name.repo, commit or "")
    if commit is None or not folder.is_dir():
        raise HubError(f"{name}: {why}, and {cache.folder()} has nothing of it")
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = str(path.relative_to(folder))
        files[file] = HubFile(file, path.stat().st_size, path.resolve().name)
    return Listing(name, commit, files, why)
