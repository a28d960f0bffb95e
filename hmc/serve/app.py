"""The ASGI application: routes, the key, bounded bodies, and errors in each interface's shape."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
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
from hmc.serve import page
from hmc.serve.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from hmc.serve.faults import ApiError, of
from hmc.serve.generations import Generations
from hmc.serve.hosts import check_host
from hmc.serve.live import live, plan_facts, step_times
from hmc.serve.log import RequestLog, note_fault
from hmc.serve.messages import faults as of_messages
from hmc.serve.messages.body import CountBody, MessagesBody
from hmc.serve.metrics import CONTENT_TYPE, Metrics
from hmc.serve.models import Model, Models
from hmc.serve.opening import Told, Uses, openai_event, with_model
from hmc.serve.props import props, server_info
from hmc.serve.reading import body as read_body
from hmc.serve.responses.body import ResponsesBody
from hmc.serve.service import Service, Settings
from hmc.serve.texts import detokenize, tokenize
from hmc.version import VERSION

_OPEN = {"/", "/health"}

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
Answer = Callable[[Service, Request, Form], Awaitable[Response]]
"""Answers a body with the model that it asks for, which is loaded."""


def application(models: Models, failed: Callable[[], None]) -> RequestLog:
    """The application; it begins and closes the models. `failed` is called when the only one cannot
    be loaded at the start.
    """
    routes = _Routes(models)
    generations = Generations(routes.metrics)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        models.begin().add_done_callback(lambda _: failed() if models.failure else None)
        try:
            yield
        finally:
            await models.close()

    table: list[tuple[str, str, Handler]] = [
        ("/", "GET", routes.page),
        ("/v1/models", "GET", routes.listed),
        ("/v1/models/{name:path}", "GET", routes.model),
        ("/v1/chat/completions", "POST", routes.asked(ChatBody, generations.chat)),
        ("/v1/completions", "POST", routes.asked(CompletionBody, generations.completions)),
        (
            "/v1/messages",
            "POST",
            routes.asked(MessagesBody, generations.messages, told=of_messages.event),
        ),
        ("/v1/messages/count_tokens", "POST", routes.asked(CountBody, generations.count)),
        ("/v1/responses", "POST", routes.asked(ResponsesBody, generations.responses)),
        ("/v1/embeddings", "POST", _no_embeddings),
        ("/props", "GET", routes.props),
        ("/server_info", "GET", routes.telling(server_info)),
        ("/tokenize", "POST", routes.asked(TokenizeBody, tokenize)),
        ("/detokenize", "POST", routes.asked(DetokenizeBody, detokenize)),
        ("/health", "GET", routes.health),
        ("/metrics", "GET", routes.measured),
        ("/version", "GET", routes.version),
        ("/live", "GET", routes.telling(live)),
        ("/live/plan", "GET", routes.telling(plan_facts)),
        ("/live/steps", "GET", routes.telling(step_times)),
    ]
    inner = Starlette(
        routes=[
            Route(path, routes.guarded(path, handler), methods=[method])
            for path, method, handler in table
        ],
        lifespan=lifespan,
        middleware=_around(models.settings),
        exception_handlers={HTTPException: _http_error, Exception: _fault},
    )
    return RequestLog(Uses(inner), models.settings.access_log)


def _around(settings: Settings) -> list[Middleware]:
    """What every request passes: the leave of other origins' pages."""
    if not settings.allowed_origins:
        return []
    origins, methods = list(settings.allowed_origins), ["GET", "POST"]
    leave = Middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=["*"]
    )
    return [leave]


class _Routes:
    def __init__(self, models: Models) -> None:
        self._models = models
        self.metrics = Metrics(models)
        self._keys = [key.encode() for key in models.settings.api_keys]

    def guarded(self, path: str, handler: Handler) -> Handler:
        """The handler behind the key check, with its errors answered and counted."""

        async def answer(request: Request) -> Response:
            try:
                check_host(request, self._models.settings.allowed_hosts)
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
                self.metrics.unknown.labels(path).inc(len(unknown))
                response.headers["X-Hmc-Unknown-Fields"] = ", ".join(unknown)
            self.metrics.http.labels(path, str(response.status_code)).inc()
            return response

        return answer

    def asked(
        self, form: type[Form], answer: Answer[Form], *, told: Told = openai_event
    ) -> Handler:
        """A handler of bodies: finds the model that one names and answers once it is loaded."""

        async def handler(request: Request) -> Response:
            body, unknown = await read_body(request, form, self._models.most_body_bytes)
            request.state.unknown_fields = unknown
            return await with_model(
                self._models,
                self._models.find(body.model),
                request,
                lambda service: answer(service, request, body),
                streams=getattr(body, "stream", False),
                told=told,
            )

        return handler

    def telling(self, tell: Callable[[Model], dict[str, Any]]) -> Handler:
        """A handler that tells of the model that `?model=` names, loaded or not."""

        async def handler(request: Request) -> Response:
            return JSONResponse(tell(self._models.find(request.query_params.get("model"))))

        return handler

    async def page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": page.policy(), "X-Content-Type-Options": "nosniff"}
        return Response(page.document(), media_type="text/html", headers=headers)

    async def props(self, request: Request) -> Response:
        async def answer(service: Service) -> Response:
            return JSONResponse(props(service))

        model = self._models.find(request.query_params.get("model"))
        return await with_model(self._models, model, request, answer)

    async def listed(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(each) for each in self._models]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(_described(self._models.find(request.path_params["name"])))

    async def health(self, _: Request) -> Response:
        models, state = self._models, self._models.state
        answer: dict[str, Any] = {"status": state}
        if state != "ready":
            answer["reason"] = models.reason
        if models.only is not None:
            answer |= _beside(models.only)
            if state != "ready" and models.only.service is not None:
                answer["progress"] = round(models.only.service.progress, 3)
        answer["models"] = {each.name: each.described() | _beside(each) for each in models}
        return JSONResponse(answer, 200 if state == "ready" else 503)

    async def measured(self, _: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": VERSION})

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


def _described(model: Model) -> dict[str, Any]:
    """A model as OpenAI lists one, with its status as llama-server's router has it."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "hmc",
        "max_model_len": model.plan.limits.max_context,
        "status": model.described(),
    }


def _beside(model: Model) -> dict[str, Any]:
    """The prefill process beside a model, where there is one."""
    stats = model.stats()
    if stats is None or stats.prefill is None:
        return {}
    return {"prefill_process": asdict(stats.prefill)}


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
