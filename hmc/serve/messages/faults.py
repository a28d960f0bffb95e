"""Errors in Anthropic's shape: {"type": "error", "error": {type, message}, "request_id"}; hides
which status has which type.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from hmc.serve.faults import ApiError
from hmc.serve.log import request_id

_OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_ours(path: str) -> bool:
    """Whether a route is of this interface."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def body(fault: ApiError) -> dict[str, Any]:
    """The JSON of an error, as streams have it."""
    other = "api_error" if fault.status >= 500 else "invalid_request_error"
    kind = _TYPES.get(fault.status, other)
    return {"type": "error", "error": {"type": kind, "message": fault.message}}


def event(fault: ApiError) -> str:
    """An error as an event of a stream, as it is sent."""
    return f"event: error\ndata: {json.dumps(body(fault))}\n\n"


def response(fault: ApiError, scope: Scope) -> JSONResponse:
    """The HTTP response of an error; who may come again later is told 529 where others are told
    503.
    """
    known = request_id(scope)
    headers = {**(fault.headers or {}), "request-id": known}
    status = _OVERLOADED if fault.status == 503 else fault.status
    return JSONResponse({**body(fault), "request_id": known}, status, headers=headers)
