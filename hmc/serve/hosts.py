"""Which names of this server are answered: a page of somebody else's, whose name was made to lead
here (DNS rebinding), says its own in Host.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.requests import Request

from hmc.serve.faults import ApiError

ANY = "*"
LOOPBACK = ("localhost", "::1")
_PORT = re.compile(r":\d*$")


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this machine's alone."""
    return host in LOOPBACK or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def allowed_hosts(listening: str, given: Sequence[str]) -> tuple[str, ...]:
    """Names to answer besides those of the loopback: those `given`; on another address than the
    loopback's, without any, all.
    """
    return tuple(given) or (() if is_loopback(listening) else (ANY,))


def check_host(request: Request, allowed: Sequence[str]) -> None:
    """Raise a 403 for a Host that is not `allowed`; browsers always send one."""
    name = _PORT.sub("", request.headers.get("host", "")).strip("[]").lower()
    if not name or ANY in allowed or name in allowed or is_loopback(name):
        return
    text = f"the host {name!r} is not answered here: start hmc serve with --allowed-host {name}"
    raise ApiError(403, text, code="host_not_allowed")
