"""A hub that is played by this process: its API, redirects to a storage of another origin, ranges,
hashes; and on demand closed doors, connections that break and bytes that are wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from hmc.hub import ranges

_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_STORAGE = re.compile(r"/storage/([0-9a-f]{64})")
_LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Request:
    """What was asked, and how many bytes of a file went out for it."""

    method: str
    path: str
    range: str
    authorization: str
    sent: int = 0


@dataclass
class PlayedHub:
    """`models` are files by model; all of a model's revisions are `revisions`."""

    port: int = 0
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    token: str = ""
    """What files are only given for, where it is not empty."""
    cuts: list[int] = field(default_factory=list)
    """Each breaks one transfer of a large file after so many bytes."""
    wrong: bool = False
    """Whether the last byte of large files is another."""
    ranges: bool = True
    answer: bytes = b""
    """What is said of any model, where it is not empty."""
    requests: list[Request] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, directory: Path) -> None:
        """Publish the files of a directory."""
        self.models[name] = {
            str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }

    def sent(self, end: str = "") -> int:
        """Bytes of files that went out so far; of those with this end alone, if it is given."""
        names = {
            _lfs(data)["sha256"]: name
            for files in self.models.values()
            for name, data in files.items()
        }
        paths = ((names.get(r.path.rpartition("/")[2], r.path), r.sent) for r in self.requests)
        return sum(sent for path, sent in paths if path.endswith(end))


@contextmanager
def playing() -> Iterator[PlayedHub]:
    """A hub for the length of a `with`."""
    hub = PlayedHub()

    class Handler(_Handler):
        played = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(30)


def believe(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT says is read once a process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(ranges, "_PAUSES", (0, 0))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    played: PlayedHub

    def log_message(self, *_: Any) -> None:
        """Nothing: tests read `requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        headers = (self.headers.get(name, "") for name in ("Range", "Authorization"))
        request = Request(self.command, unquote(path), *headers)
        self.played.requests.append(request)
        if match := _API.fullmatch(path):
            self._info(match[1], unquote(match[2] or "main"))
        elif match := _TREE.fullmatch(path):
            self._tree(match[1])
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(request, match[1], unquote(match[2]), unquote(match[3]))
        elif match := _STORAGE.fullmatch(path):
            self._stored(request, match[1])
        else:
            self._refuse(404, "")

    def _info(self, name: str, revision: str) -> None:
        files = self.played.models.get(name)
        commit = self._commit(revision)
        if self.played.answer:
            self._say(None, self.played.answer)
            return
        if files is None or commit is None:
            self._refuse(404, "RepoNotFound" if files is None else "RevisionNotFound")
            return
        siblings = [
            {"rfilename": file, "size": len(data), "blobId": git_hash(data)}
            | ({"lfs": _lfs(data)} if _is_large(file) else {})
            for file, data in files.items()
        ]
        about = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [],
                 "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
        self._say(about)

    def _tree(self, name: str) -> None:
        self._say(
            [
                {"type": "file", "path": file, "size": len(data), "oid": git_hash(data)}
                | ({"lfs": {"oid": _lfs(data)["sha256"]} | _lfs(data)} if _is_large(file) else {})
                for file, data in self.played.models[name].items()
            ]
        )

    def _say(self, value: object, instead: bytes = b"") -> None:
        body = instead or json.dumps(value).encode()
        self._head(200, {"Content-Length": str(len(body)), "Content-Type": "application/json"})
        self.wfile.write(body)

    def _resolve(self, request: Request, name: str, revision: str, file: str) -> None:
        files, commit = self.played.models.get(name), self._commit(revision)
        if files is None or commit is None:
            self._refuse(404, "RepoNotFound" if files is None else "RevisionNotFound")
        elif self.played.token and request.authorization != f"Bearer {self.played.token}":
            self._refuse(403 if request.authorization else 401, "GatedRepo")
        elif file not in files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        elif _is_large(file):
            lfs = _lfs(files[file])
            where = f"http://localhost:{self.played.port}/storage/{lfs['sha256']}"
            linked = {"X-Linked-Etag": f'"{lfs["sha256"]}"', "X-Linked-Size": str(lfs["size"])}
            about = {"Location": where, "X-Repo-Commit": commit, "Content-Length": "0"}
            self._head(302, about | linked)
        else:
            etag = {"ETag": f'"{git_hash(files[file])}"', "X-Repo-Commit": commit}
            self._send(request, files[file], etag)

    def _stored(self, request: Request, digest: str) -> None:
        contents = (data for files in self.played.models.values() for data in files.values())
        found = next((data for data in contents if _lfs(data)["sha256"] == digest), None)
        if found is None:
            self._refuse(404, "")
            return
        if self.played.wrong:
            found = found[:-1] + bytes([found[-1] ^ 1])
        self._send(request, found, {}, breaks=request.method == "GET")

    def _send(
        self, request: Request, data: bytes, headers: dict[str, str], breaks: bool = False
    ) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range) if self.played.ranges else None
        first, last = 0, len(data) - 1
        if match:
            first, last = int(match[1]), min(int(match[2] or last), last)
            headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} | headers
        body = data[first : last + 1]
        self._head(206 if match else 200, {"Content-Length": str(len(body))} | headers)
        if request.method == "HEAD":
            return
        if breaks and self.played.cuts:
            body = body[: self.played.cuts.pop(0)]
            self.close_connection = True
        request.sent = len(body)
        try:
            self.wfile.write(body)
        except OSError:  # whoever asked has read enough
            self.close_connection = True

    def _commit(self, revision: str) -> str | None:
        known = self.played.revisions
        return revision if revision in known.values() else known.get(revision)

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        about = {"X-Error-Code": code} if code else {}
        self._head(status, {"Content-Length": "0"} | about | (headers or {}))

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _is_large(file: str) -> bool:
    return file.endswith(_LARGE)


@lru_cache(64)
def git_hash(data: bytes) -> str:
    """What git calls a blob."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@lru_cache(64)
def _lfs(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
