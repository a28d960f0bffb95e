"""Bodies of requests: read no further than their limit and no longer than their time, and parsed
beside the event loop where they are large.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from starlette.requests import Request

from hmc.serve.faults import ApiError
from hmc.serve.fields import Body, read

_SECONDS = 30.0
_BYTES_A_SECOND = 16 << 10  # what a slow line brings: each adds to the time
_LARGE = 64 << 10
_CLOSE = {"Connection": "close"}

Form = TypeVar("Form", bound=Body)


async def body(request: Request, form: type[Form], most: int) -> tuple[Form, list[str]]:
    """The JSON body of at most `most` bytes, and its unknown fields; raises `ApiError` (408, 413,
    415, and what `read` refuses), pydantic's `ValidationError`, or `ClientDisconnect`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be sent with Content-Type: application/json")
    loop, begin = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    parts, total = [], 0
    try:
        async with asyncio.timeout(_SECONDS) as limit:
            async for part in request.stream():
                total += len(part)
                if total > most:
                    text = f"the body has more than {most} bytes"
                    raise ApiError(413, text, code="body_too_large", headers=_CLOSE)
                parts.append(part)
                limit.reschedule(begin + _SECONDS + total / _BYTES_A_SECOND)
    except TimeoutError:
        text = f"the body did not arrive within {loop.time() - begin:.0f} s"
        raise ApiError(408, text, code="body_timeout", headers=_CLOSE) from None
    data = b"".join(parts)
    if total > _LARGE:
        return await asyncio.to_thread(read, form, data)
    return read(form, data)
