"""/tokenize and /detokenize."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hmc.runtime.tokens.text import Text
from hmc.serve import conversation
from hmc.serve.bodies import DetokenizeBody, TokenizeBody
from hmc.serve.faults import bad_request
from hmc.serve.service import Service


async def tokenize(service: Service, _: Request, body: TokenizeBody) -> Response:
    """POST /tokenize: the token ids of a text or a conversation."""
    text = _text(service)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give prompt or messages")
    scheduler = service.ready()[1]
    with scheduler.places(1):
        if body.messages is not None:
            tokens = await asyncio.to_thread(conversation.encoded, service, text, body)
        else:
            prompt, special = body.prompt or "", body.add_special_tokens
            tokens = await asyncio.to_thread(text.encode, prompt, special=special)
    most = service.plan.limits.max_context
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": most})


async def detokenize(service: Service, _: Request, body: DetokenizeBody) -> Response:
    """POST /detokenize: the text of token ids."""
    text = _text(service)
    vocab = service.plan.model.vocab
    if wrong := [token for token in body.tokens if not 0 <= token < vocab]:
        raise bad_request(f"token id {wrong[0]} is outside 0..{vocab - 1}", "tokens")
    return JSONResponse({"prompt": text.decode(body.tokens)})


def _text(service: Service) -> Text:
    engine, _ = service.ready()
    if engine.text is None:
        raise bad_request("this checkpoint has no tokenizer")
    return engine.text
