"""What goes wrong with a request, in OpenAI's shape: {"error": {message, type, param, code}}; hides
which error is which HTTP status.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from hmc.errors import (
    CapacityError,
    ContextLengthError,
    ExecutionError,
    HmcError,
    QueueFullError,
    RequestTimeoutError,
    UsageError,
)

_RETRY_SECONDS = 1


class ApiError(Exception):
    """An answer that is an error; `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, headers

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        names = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": names}

    def response(self) -> JSONResponse:
        """The HTTP response of it."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def of(error: ApiError | ValidationError | HmcError) -> ApiError:
    """The answer to whatever goes wrong on purpose."""
    if isinstance(error, HmcError):
        return of_error(error)
    return of_validation(error) if isinstance(error, ValidationError) else error


def of_error(error: HmcError) -> ApiError:
    """The answer to an error of hmc."""
    text = str(error)
    if isinstance(error, ContextLengthError | CapacityError):
        return bad_request(text, code="context_length_exceeded")
    if isinstance(error, UsageError):
        return bad_request(text)
    if isinstance(error, QueueFullError):
        # Not 503: clients wait and try again after either, but routers take a server out for 503.
        return ApiError(
            429,
            text,
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(_RETRY_SECONDS)},
        )
    if isinstance(error, RequestTimeoutError):
        # OpenAI's clients send a 504 again by themselves: that would take as long.
        again = {"X-Should-Retry": "false"}
        kind = "timeout_error"
        return ApiError(504, text, kind=kind, code="request_timeout", headers=again)
    if isinstance(error, ExecutionError):
        return ApiError(503, text, kind="server_error", code="unavailable")
    return ApiError(500, text, kind="server_error")


def of_validation(error: ValidationError) -> ApiError:
    """The answer to a body that does not have the right form: its first fault, with the field's
    name.
    """
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    fault = faults[0]
    if fault["loc"][-1:] == ("str",):  # a text or a list: what is wrong in the list says more
        around = fault["loc"][:-1]
        same = [each for each in faults if each["loc"][: len(around)] == around]
        fault = max(same, key=lambda each: len(each["loc"]))
    names = [str(part) for part in fault["loc"]]
    place = ".".join(name for name in names if name != "str" and "[" not in name)
    if fault["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {fault['msg']}")
    message = fault["msg"]
    return bad_request(f"{place}: {message}" if place else message, place or None)
