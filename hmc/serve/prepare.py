"""From a body to the scheduler's requests: prompts in tokens, sampling, ends and constraints; hides
defaults and what excludes what.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hmc.runtime.engine import Engine
from hmc.runtime.tokens.generation import Ends
from hmc.runtime.tokens.requests import Mask, Request, token_ids
from hmc.runtime.tokens.sampler import Sampler, SamplingParams
from hmc.runtime.tokens.text import StopStrings, Text
from hmc.serve.bodies import ChatBody, CompletionBody, Message, NamedChoice, Sampling, ToolCall
from hmc.serve.faults import bad_request
from hmc.serve.service import Service
from hmc.serve.tools import CallFinder, Form

_MOST_STOPS = 16


@dataclass(frozen=True)
class Prepared:
    """Requests in the order of their choices; `finder` makes a finder of tool calls for a choice.

    `choices_per_prompt` requests share each prompt.
    """

    requests: list[Request]
    prompts: list[list[int]]
    choices_per_prompt: int
    tools: Form | None = None
    opening: str = ""

    def finder(self) -> CallFinder | None:
        """A new finder of tool calls; None when the answer is not searched for any."""
        return None if self.tools is None else CallFinder(self.tools, self.opening)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt) for prompt in self.prompts)


def completions(service: Service, body: CompletionBody) -> Prepared:
    """The requests of a completion; raises `ApiError` or `HmcError`."""
    engine, _ = service.ready()
    prompts = _prompts(engine.text, body.prompt)
    _check(service, body, len(prompts) * body.n, "prompt")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens: 0 is for scoring a prompt, with echo", "max_tokens")
    requests = []
    for prompt in prompts:
        _fits(engine, prompt, body.max_tokens)
        for number in range(body.n):
            request = _request(engine, body, prompt, body.max_tokens, number)
            request.logprobs = body.logprobs
            request.prompt_logprobs = body.echo and body.logprobs is not None
            requests.append(request)
    return Prepared(requests, prompts, body.n)


def chat(service: Service, body: ChatBody) -> Prepared:
    """The requests of a chat; raises `ApiError` or `HmcError`."""
    engine, _ = service.ready()
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise bad_request("give max_tokens or max_completion_tokens, not both", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs", "top_logprobs")
    _check(service, body, body.n, "n")
    offered, chosen = _offered(body)
    text = _text(engine)
    form = service.form() if offered else None
    constraint = None
    opening = ""
    if form is not None and chosen:
        forced = form.forced(chosen)
        opening = forced.opening
        constraint = service.grammars().either(forced.parts)
    elif body.response_format is not None:
        constraint = _format(service, body)
    prompt = text.encode_chat(messages(service, body.messages), tools=offered or None)
    if opening:
        prompt += text.encode(opening, special=False)
    asked = body.max_completion_tokens or body.max_tokens
    most = _fits(engine, prompt, asked)
    requests = []
    for number in range(body.n):
        request = _request(engine, body, prompt, most, number)
        if body.logprobs:
            request.logprobs = body.top_logprobs or 0
        if constraint is not None:
            mask: Mask = service.grammars().mask(constraint)
            request.mask = mask
        requests.append(request)
    return Prepared(requests, [prompt], body.n, form, opening)


def messages(service: Service, given: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the model's chat template wants them: content as text, arguments of calls in its
    form.
    """
    result = []
    for message in given:
        content = message.content
        if content is None and message.role != "assistant":
            raise bad_request(f"messages: a message of the {message.role} without content")
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        entry = message.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
        entry["role"] = "system" if message.role == "developer" else message.role
        entry["content"] = content or ""
        if message.tool_calls:
            entry["tool_calls"] = [_called(service, call) for call in message.tool_calls]
        result.append(entry)
    return result


def _called(service: Service, call: ToolCall) -> dict[str, Any]:
    found = call.model_dump()
    if not service.form().arguments_as_text:
        try:
            found["function"]["arguments"] = json.loads(call.function.arguments)
        except ValueError as error:
            raise bad_request(f"messages: arguments of a tool call are not JSON: {error}") from None
    return found


def _request(
    engine: Engine, body: Sampling, prompt: Sequence[int], most: int, number: int
) -> Request:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > _MOST_STOPS:
        raise bad_request(f"stop: at most {_MOST_STOPS} stop strings", "stop")
    if stops:
        _text(engine)
    explicit = body.model_dump(
        include={"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
    )
    if body.seed is not None:
        explicit["seed"] = body.seed + number
    params = SamplingParams.resolve(explicit, engine.text.generation_config if engine.text else {})
    eos = () if body.ignore_eos else engine.eos_token_ids
    return Request(
        np.asarray(prompt, np.int32),
        Sampler(params, prompt),
        Ends(most, eos, StopStrings(stops)),
        engine.text,
    )


def _prompts(text: Text | None, given: str | list[Any]) -> list[list[int]]:
    """Prompts as token ids."""
    if isinstance(given, str):
        given = [given]
    if not given:
        raise bad_request("prompt: it is empty", "prompt")
    if isinstance(given[0], int):
        return [list(given)]
    if isinstance(given[0], list):
        return [list(ids) for ids in given]
    if text is None:
        raise bad_request("this checkpoint has no tokenizer: give token ids", "prompt")
    if not all(given):
        raise bad_request("prompt: it is empty", "prompt")
    return [text.encode(prompt) for prompt in given]


def _fits(engine: Engine, prompt: Sequence[int], asked: int | None) -> int:
    """How many new tokens a request may have; raises `HmcError` or `ApiError` when the prompt and
    what was asked for exceed the context. The last token is never stored, so one more fits.
    """
    context = engine.plan.limits.max_context
    token_ids(prompt, engine.plan.model.vocab, context)
    room = min(context, engine.executor.kv.capacity_tokens) - len(prompt) + 1
    if asked is None:
        return room
    if len(prompt) + asked > context + 1:
        raise bad_request(
            f"the prompt has {len(prompt)} tokens and {asked} new ones are asked for: the context"
            f" holds {context}; shorten one of them",
            "max_tokens",
            "context_length_exceeded",
        )
    return asked


def _check(service: Service, body: Sampling, choices: int, field: str) -> None:
    """Refuse for good what even an empty queue could not take, and options of no stream."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream", "stream_options")
    most = service.settings.max_queue
    if choices > most:
        raise bad_request(
            f"{field}: {choices} choices in one request, {most} may wait at a time: ask for fewer"
            " or serve with a larger --max-queue",
            field,
        )


def _offered(body: ChatBody) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tools offered, and those of which one has to be called."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice = body.tool_choice
    if choice in ("auto", "required") and not tools:
        raise bad_request("tool_choice needs tools", "tool_choice")
    if choice == "none":
        return [], []
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        chosen = [tool for tool in tools if tool["function"]["name"] == name]
        if not chosen:
            raise bad_request(f"tool_choice: no tool is named {name!r}", "tool_choice")
        return tools, chosen
    return tools, tools if choice == "required" else []


def _format(service: Service, body: ChatBody) -> str | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return service.grammars().json({"type": "object"})
    if wanted.json_schema is None:
        raise bad_request("response_format.json_schema is missing", "response_format.json_schema")
    return service.grammars().json(wanted.json_schema.schema_)


def _text(engine: Engine) -> Text:
    if engine.text is None:
        raise bad_request("this checkpoint has no tokenizer: give token ids to /v1/completions")
    return engine.text
