"""The hub's cache on this machine, as all of its clients lay it out: what files have been fetched,
by any of them; hides its folders.

    models--org--name/refs/REVISION         the commit that a branch or a tag was
    models--org--name/snapshots/COMMIT/     the files of a commit, links to
    models--org--name/blobs/ETAG            what they hold
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants

from hmc.errors import HubError
from hmc.files import write_beside

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_commit(revision: str) -> bool:
    """Whether a revision can name no other files tomorrow."""
    return _COMMIT.fullmatch(revision) is not None


def is_etag(text: str) -> bool:
    """Whether a hash is one that blobs are kept by: git's, or a SHA-256."""
    return _ETAG.fullmatch(text) is not None


def folder() -> Path:
    """The cache of all models (HF_HOME, HF_HUB_CACHE)."""
    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def storage(repo: str) -> Path:
    """That of one model."""
    return folder() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, commit: str) -> Path:
    """The model directory of a commit; what has not been fetched is absent in it."""
    return storage(repo) / "snapshots" / commit


def blob(repo: str, etag: str) -> Path:
    """What a file holds, under whatever name."""
    return storage(repo) / "blobs" / etag


def lock(repo: str, etag: str) -> Path:
    """What clients lock while they write a blob."""
    return folder() / ".locks" / storage(repo).name / f"{etag}.lock"


def known_commit(repo: str, revision: str) -> str | None:
    """The commit that a revision was when the hub was asked last; None where it never was."""
    revision = revision or constants.DEFAULT_REVISION
    if is_commit(revision):
        return revision
    try:
        commit = (storage(repo) / "refs" / revision).read_text().strip()
    except OSError:
        return None
    return commit if is_commit(commit) else None


def remember(repo: str, revision: str, commit: str) -> None:
    """Keep which commit a revision is."""
    revision = revision or constants.DEFAULT_REVISION
    if is_commit(revision) or known_commit(repo, revision) == commit:
        return
    path = storage(repo) / "refs" / revision
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, commit)
    except OSError as error:
        raise HubError(f"{path}: cannot be written: {error.strerror or error}") from error
