"""From a body to the scheduler's requests: prompts in tokens, sampling, ends and constraints; hides
defaults and what excludes what.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hmc.runtime.engine import Engine
from hmc.runtime.tokens.generation import Ends
from hmc.runtime.tokens.requests import Request, token_ids
from hmc.runtime.tokens.sampler import Sampler, SamplingParams
from hmc.runtime.tokens.text import StopStrings, Text
from hmc.serve.bodies import (
    ChatBody,
    CompletionBody,
    ResponseFormat,
    Sampling,
    StructuredOutputs,
)
from hmc.serve.conversation import encoded, offered
from hmc.serve.faults import bad_request
from hmc.serve.grammar import Constraint, Grammars
from hmc.serve.reasoning import Harmony, Markers, ThoughtFinder, begun_by, markers_of
from hmc.serve.service import Service
from hmc.serve.tools import CallFinder, Form

_MOST_STOPS = 16
_COMPLETION_TOKENS = 16  # OpenAI's default
_OBJECT: dict[str, Any] = {"type": "object"}
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"),
    *("frequency_penalty", "presence_penalty", "logit_bias"),
)


@dataclass(frozen=True)
class Prepared:
    """Requests in the order of their choices; `finder` makes a finder of tool calls for a choice,
    `thought_finder` one of the thought that it begins with (the prompt does, if `thinking`).

    `choices_per_prompt` requests share each prompt.
    """

    requests: list[Request]
    prompts: list[list[int]]
    choices_per_prompt: int
    tools: Form | None = None
    opening: str = ""
    thoughts: Markers | Harmony | None = None
    thinking: bool = False
    most_calls: int | None = None
    offered: Sequence[dict[str, Any]] = ()

    def finder(self) -> CallFinder | None:
        """A new finder of tool calls; None when the answer is not searched for any."""
        if self.tools is None:
            return None
        return CallFinder(self.tools, self.opening, self.offered)

    def thought_finder(self) -> ThoughtFinder | None:
        """A new finder of the thought; None when the answer is not searched for any."""
        return None if self.thoughts is None else self.thoughts.finder(begun=self.thinking)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt) for prompt in self.prompts)


def choices(service: Service, body: CompletionBody | ChatBody) -> int:
    """How many answers a body asks for, each of which takes a place in the queue; known before its
    prompts are read. Raises `ApiError` for more than even an empty queue could take, and for
    options of no stream.
    """
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream", "stream_options")
    prompts, field = 1, "n"
    if isinstance(body, CompletionBody):
        field = "prompt"
        if isinstance(body.prompt, list) and body.prompt and not isinstance(body.prompt[0], int):
            prompts = len(body.prompt)
    count, most = prompts * body.n, service.settings.max_queue
    if count > most:
        raise bad_request(
            f"{field}: {count} choices in one request, {most} may wait at a time: ask for fewer"
            " or serve with a larger --max-queue",
            field,
        )
    return count


def completions(service: Service, body: CompletionBody) -> Prepared:
    """The requests of a completion; raises `ApiError` or `HmcError`."""
    engine, _ = service.ready()
    choices(service, body)
    prompts = _prompts(engine.text, body)
    asked = _limit(body, _COMPLETION_TOKENS)
    if asked == 0 and not body.echo:
        raise bad_request("max_tokens: 0 is for scoring a prompt, with echo", "max_tokens")
    constraint = _constraint(service, body)
    requests = []
    for prompt in prompts:
        most = _fits(engine, prompt, asked)
        for number in range(body.n):
            request = _request(engine, body, prompt, most, number)
            _hold(service, request, constraint)
            request.logprobs = body.logprobs
            request.prompt_logprobs = body.echo and body.logprobs is not None
            requests.append(request)
    return Prepared(requests, prompts, body.n)


def chat(service: Service, body: ChatBody, *, clipped: bool = False) -> Prepared:
    """The requests of a chat; raises `ApiError` or `HmcError`. If `clipped`, more tokens may be
    asked for than the context has room for.
    """
    engine, _ = service.ready()
    asked = _limit(body, None)
    if asked == 0:
        raise bad_request("max_tokens: an answer has at least one token", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs", "top_logprobs")
    choices(service, body)
    tools, chosen = offered(body)
    text = text_of(engine)
    form = service.form() if tools else None
    opening = ""
    constraint: Constraint | None
    if form is not None and chosen:
        forced = form.forced(chosen)
        opening = forced.opening
        constraint = service.grammars().either(forced.parts)
    else:
        constraint = _constraint(service, body)
    prompt = encoded(service, text, body)
    thoughts = markers_of(text.chat) if text.chat else None
    shown = text.showing((*(form.markers if form else ()), *(thoughts.shown if thoughts else ())))
    thinking = begun_by(thoughts, shown, prompt)
    if thoughts is not None and thinking and constraint is not None:  # it thinks about nothing
        prompt += text.encode(thoughts.closing(opening), special=False)
        thinking = False
    if opening:
        prompt += text.encode(opening, special=False)
    most = _fits(engine, prompt, None if clipped else asked)
    if asked is not None:
        most = min(most, asked)
    requests = []
    for number in range(body.n):
        request = _request(engine, body, prompt, most, number)
        request.text = shown
        if body.logprobs:
            request.logprobs = body.top_logprobs or 0
        _hold(service, request, constraint)
        requests.append(request)
    if body.reasoning_format == "none":
        thoughts = None
    return Prepared(
        requests,
        [prompt],
        body.n,
        form,
        opening,
        thoughts,
        thinking,
        None if body.parallel_tool_calls else 1,
        tools,
    )


def _hold(service: Service, request: Request, constraint: Constraint | None) -> None:
    """Hold an answer to a grammar."""
    if constraint is not None:
        request.mask = service.grammars().mask(constraint)


def _limit(body: Sampling, default: int | None) -> int | None:
    """How many new tokens are asked for; None: as many as fit."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("max_tokens and max_completion_tokens differ: give one", "max_tokens")
    for asked in (body.max_completion_tokens, body.max_tokens, body.n_predict):
        if asked is not None:
            return None if asked == -1 else asked
    return default


def _request(
    engine: Engine, body: Sampling, prompt: Sequence[int], most: int, number: int
) -> Request:
    stops = body.stop or []
    if len(stops) > _MOST_STOPS:
        raise bad_request(f"stop: at most {_MOST_STOPS} stop strings", "stop")
    if stops:
        text_of(engine)
    explicit = {name: getattr(body, name) for name in _SAMPLING}
    if body.repetition_penalty is None:
        explicit["repetition_penalty"] = body.repeat_penalty
    if body.seed is not None:
        explicit["seed"] = body.seed + number
    params = SamplingParams.resolve(explicit, engine.text.generation_config if engine.text else {})
    params.check_tokens(engine.plan.model.vocab)
    eos = (*(() if body.ignore_eos else engine.eos_token_ids), *(body.stop_token_ids or ()))
    return Request(
        np.asarray(prompt, np.int32),
        Sampler(params, prompt),
        Ends(most, eos, StopStrings(stops)),
        engine.text,
    )


def _prompts(text: Text | None, body: CompletionBody) -> list[list[int]]:
    """Prompts as token ids."""
    given: Any = body.prompt
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
    return [text.encode(prompt, special=body.add_special_tokens) for prompt in given]


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


def _constraint(service: Service, body: Sampling) -> Constraint | None:
    """What the answer is held to; None for anything."""
    structured = body.structured_outputs or StructuredOutputs()
    ways: tuple[tuple[str, Callable[[Grammars, Any], Constraint], Any], ...] = (
        ("response_format", Grammars.json, _format(body.response_format)),
        ("structured_outputs.json", Grammars.json, structured.json_),
        ("structured_outputs.json_object", Grammars.json, structured.json_object and _OBJECT),
        ("structured_outputs.regex", Grammars.regex, structured.regex),
        ("structured_outputs.choice", Grammars.choice, structured.choice),
        ("guided_json", Grammars.json, body.guided_json),
        ("guided_regex", Grammars.regex, body.guided_regex),
        ("guided_choice", Grammars.choice, body.guided_choice),
        ("json_schema", Grammars.json, body.json_schema),
    )
    asked = [way for way in ways if way[2] not in (None, False)]
    if not asked:
        return None
    name, make, value = asked[0]
    if len(asked) > 1:
        other = asked[1][0]
        raise bad_request(f"{name} and {other} both say what the answer is: give one", other)
    if make is Grammars.json and isinstance(value, str):
        value = _schema(name, value)
    return make(service.grammars(), value)


def _format(form: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema of a response_format; None for a text."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return form.schema_ or _OBJECT
    if form.json_schema is None:
        name = "response_format.json_schema"
        raise bad_request(f"{name} is missing", name)
    return form.json_schema.schema_ or _OBJECT


def _schema(name: str, text: str) -> dict[str, Any]:
    """A JSON schema that is given as text."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise bad_request(f"{name}: the text is no JSON schema", name)
    return schema


def text_of(engine: Engine) -> Text:
    """The tokenizer; a 400 when there is none."""
    if engine.text is None:
        raise bad_request("this checkpoint has no tokenizer: give token ids to /v1/completions")
    return engine.text
