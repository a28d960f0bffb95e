"""The ASGI application: routes, the key, bounded bodies, and errors in each interface's shape."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hmc.errors import HmcError
from hmc.serve import conversation
from hmc.serve.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from hmc.serve.faults import ApiError, bad_request, of
from hmc.serve.generations import Generations
from hmc.serve.hosts import check_host
from hmc.serve.live import live, plan_facts, step_times
from hmc.serve.log import RequestLog, note_fault
from hmc.serve.messages import faults as of_messages
from hmc.serve.messages.body import CountBody, MessagesBody
from hmc.serve.metrics import CONTENT_TYPE, Metrics
from hmc.serve.props import props
from hmc.serve.reading import body as read_body
from hmc.serve.responses.body import ResponsesBody
from hmc.serve.service import Service, Settings
from hmc.version import VERSION

_OPEN = {"/", "/health"}
_PAGE = Path(__file__).parent / "page" / "index.html"
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none';"
    " form-action 'none'"
)

Handler = Callable[[Request], Awaitable[Response]]
Form = TypeVar(
    "Form",
    CompletionBody,
    ChatBody,
    MessagesBody,
    CountBody,
    ResponsesBody,
    TokenizeBody,
    DetokenizeBody,
)


def application(service: Service, failed: Callable[[], None]) -> RequestLog:
    """The application; it begins and closes the service. `failed` is called, in another thread,
    when loading fails.
    """
    routes = _Routes(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.begin(failed)
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    facts = plan_facts(service.plan, service.settings.name)
    table: list[tuple[str, str, Handler]] = [
        ("/", "GET", routes.page),
        ("/v1/models", "GET", _telling(lambda: {"object": "list", "data": [routes.described()]})),
        ("/v1/models/{name:path}", "GET", routes.model),
        ("/v1/chat/completions", "POST", routes.chat),
        ("/v1/completions", "POST", routes.completions),
        ("/v1/messages", "POST", routes.messages),
        ("/v1/messages/count_tokens", "POST", routes.count),
        ("/v1/responses", "POST", routes.responses),
        ("/v1/embeddings", "POST", _no_embeddings),
        ("/props", "GET", _telling(lambda: props(service))),
        ("/tokenize", "POST", routes.tokenize),
        ("/detokenize", "POST", routes.detokenize),
        ("/health", "GET", routes.health),
        ("/metrics", "GET", routes.metrics),
        ("/version", "GET", _telling(lambda: {"version": VERSION})),
        ("/live", "GET", _telling(lambda: live(service))),
        ("/live/plan", "GET", _telling(lambda: facts)),
        ("/live/steps", "GET", _telling(lambda: step_times(service))),
    ]
    inner = Starlette(
        routes=[
            Route(path, routes.guarded(path, handler), methods=[method])
            for path, method, handler in table
        ],
        lifespan=lifespan,
        middleware=_around(service.settings),
        exception_handlers={HTTPException: _http_error, Exception: _fault},
    )
    return RequestLog(inner, service.settings.access_log)


def _around(settings: Settings) -> list[Middleware]:
    """What every request passes: the leave of other origins' pages."""
    if not settings.allowed_origins:
        return []
    origins, methods = list(settings.allowed_origins), ["GET", "POST"]
    leave = Middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=["*"]
    )
    return [leave]


def _telling(make: Callable[[], dict[str, Any]]) -> Handler:
    """A handler that answers with what `make` gives."""

    async def handler(_: Request) -> Response:
        return JSONResponse(make())

    return handler


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._metrics = Metrics(service)
        self._generations = Generations(self._metrics)
        self._keys = [key.encode() for key in service.settings.api_keys]

    def guarded(self, path: str, handler: Handler) -> Handler:
        """The handler behind the key check, with its errors answered and counted."""

        async def answer(request: Request) -> Response:
            try:
                check_host(request, self._service.settings.allowed_hosts)
                if path not in _OPEN:
                    self._check_key(request)
                response = await handler(request)
            except (ApiError, ValidationError, HmcError) as error:
                fault = of(error)
                if fault.status >= 500:
                    note_fault(request.scope, fault.message)
                response = _told(request, fault)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            if unknown := getattr(request.state, "unknown_fields", ()):
                self._metrics.unknown.labels(path).inc(len(unknown))
                response.headers["X-Hmc-Unknown-Fields"] = ", ".join(unknown)
            self._metrics.http.labels(path, str(response.status_code)).inc()
            return response

        return answer

    async def page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(_PAGE.read_bytes(), media_type="text/html", headers=headers)

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self.described())

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionBody)
        return await self._generations.completions(self._service, request, body)

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, ChatBody)
        return await self._generations.chat(self._service, request, body)

    async def messages(self, request: Request) -> Response:
        body = await self._body(request, MessagesBody)
        return await self._generations.messages(self._service, request, body)

    async def count(self, request: Request) -> Response:
        body = await self._body(request, CountBody)
        return await self._generations.count(self._service, request, body)

    async def responses(self, request: Request) -> Response:
        body = await self._body(request, ResponsesBody)
        return await self._generations.responses(self._service, request, body)

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeBody)
        text = self._text()
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give prompt or messages")
        if body.messages is not None:
            tokens = await asyncio.to_thread(conversation.encoded, self._service, text, body)
        else:
            special = body.add_special_tokens
            tokens = await asyncio.to_thread(text.encode, body.prompt, special=special)
        most = self._service.plan.limits.max_context
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": most})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeBody)
        text = self._text()
        vocab = self._service.plan.model.vocab
        if wrong := [token for token in body.tokens if not 0 <= token < vocab]:
            raise bad_request(f"token id {wrong[0]} is outside 0..{vocab - 1}", "tokens")
        return JSONResponse({"prompt": text.decode(body.tokens)})

    async def health(self, _: Request) -> Response:
        service = self._service
        state = service.state
        answer: dict[str, Any] = {"status": state}
        stats = None if service.scheduler is None else service.scheduler.stats()
        if stats is not None and stats.prefill is not None:
            answer["prefill_process"] = asdict(stats.prefill)
        if state != "ready":
            answer |= {"reason": service.reason, "progress": round(service.progress, 3)}
        return JSONResponse(answer, 200 if state == "ready" else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _body(self, request: Request, form: type[Form]) -> Form:
        """The body of a request for the model served here."""
        body, unknown = await read_body(request, form, self._service.most_body_bytes)
        request.state.unknown_fields = unknown
        self._check_model(body.model)
        return body

    def _check_key(self, request: Request) -> None:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        own = request.headers.get("x-api-key", "")
        given = [bearer.encode() if scheme == "Bearer" else b"", own.encode()]
        found = [hmac.compare_digest(g, k) for g in given for k in self._keys]  # as long for each
        if self._keys and not any(found):
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY or x-api-key",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_model(self, name: str | None) -> None:
        served = self._service.settings.name
        if name is not None and name != served:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; {served!r} is",
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )

    def described(self) -> dict[str, Any]:
        """The model as OpenAI lists one."""
        return {
            "id": self._service.settings.name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "hmc",
            "max_model_len": self._service.plan.limits.max_context,
        }

    def _text(self) -> Any:
        engine, _ = self._service.ready()
        if engine.text is None:
            raise bad_request("this checkpoint has no tokenizer")
        return engine.text


async def _no_embeddings(_: Request) -> Response:
    text = "hmc serves models that write text: it has no embedding models"
    raise ApiError(404, text, kind="not_found_error", code="unsupported")


def _told(request: Request, fault: ApiError) -> Response:
    """An error in the shape that the route's clients read."""
    if of_messages.is_ours(request.url.path):
        return of_messages.response(fault, request.scope)
    return fault.response()


async def _fault(request: Request, error: Exception) -> Response:
    """A mistake of ours; the server's log gets the traceback."""
    text = f"the server made a mistake: {type(error).__name__}: {error}"
    note_fault(request.scope, text)
    return _told(request, ApiError(500, text, kind="server_error", code="internal_error"))


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {
        404: f"no such route: {path}",
        405: f"{request.method} is not allowed on {path}",
    }.get(error.status_code, str(error.detail))
    return _told(request, ApiError(error.status_code, message, headers=dict(error.headers or {})))
