"""Bytes of a file on the hub by range requests; hides redirects, answers that end early and servers
that are away for a moment.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx2
from huggingface_hub import constants, errors, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hmc.errors import HubError
from hmc.hub.faults import told
from hmc.hub.listing import HubFile, Listing
from hmc.version import VERSION

_PIECE = 1 << 30
"""Bytes of one request; addresses that the hub redirects to hold for an hour."""
_PAUSES = (0.2, 1, 2, 4, 8)
"""Seconds before each new try, of those that bring nothing."""
_PASSING = (408, 429, 500, 502, 503, 504)


class Stopped(Exception):
    """The transfer was asked to end."""


def read(listing: Listing, file: HubFile, begin: int, end: int) -> bytes:
    """Bytes `begin` to `end` of a file; `HubError` where they cannot be had."""
    return b"".join(stream(listing, file, begin, end, threading.Event()))


def stream(
    listing: Listing, file: HubFile, begin: int, end: int, stop: threading.Event
) -> Iterator[bytes]:
    """The same bit by bit, until `stop` is set, which raises `Stopped`."""
    tries = 0
    with told(listing.pinned, file.name):
        while begin < end:
            try:
                for chunk in _request(listing, file, begin, min(end, begin + _PIECE)):
                    yield chunk
                    begin += len(chunk)
                    tries = 0
                    if stop.is_set():
                        raise Stopped
            except (httpx2.TransportError, errors.HfHubHTTPError) as error:
                status = getattr(getattr(error, "response", None), "status_code", 0)
                if tries == len(_PAUSES) or (status and status not in _PASSING):
                    raise
                if stop.wait(_PAUSES[tries]):
                    raise Stopped from None
                tries += 1


def _request(listing: Listing, file: HubFile, begin: int, end: int) -> Iterator[bytes]:
    """One request; more than was asked for is left unread."""
    url = hf_hub_url(
        listing.name.repo, file.name, revision=listing.commit, endpoint=constants.ENDPOINT
    )
    headers = {
        **build_hf_headers(library_name="hmc", library_version=VERSION),
        "Accept-Encoding": "identity",
        "Range": f"bytes={begin}-{end - 1}",
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
        hf_raise_for_status(answer)
        skip, left = _skipped(listing, file, answer, begin), end - begin
        for chunk in answer.iter_bytes():
            found = chunk[skip:][:left]
            skip -= len(chunk) - len(chunk[skip:])
            left -= len(found)
            if found:
                yield found
            if not left:
                return
        raise httpx2.RemoteProtocolError(f"it ends {left} bytes early")


def _skipped(listing: Listing, file: HubFile, answer: httpx2.Response, begin: int) -> int:
    """Bytes of an answer before those asked for: some servers know no ranges."""
    if answer.status_code != 206:
        return begin
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if total.isdigit() and int(total) != file.size:
        raise HubError(
            f"{listing.pinned}: {file.name}: has {total} bytes, had {file.size} when the model was"
            " looked up: it changed meanwhile, begin again"
        )
    return 0
