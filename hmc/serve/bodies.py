"""Bodies of requests, as OpenAI's interface defines them: what is not named here is refused by
name. Fields that hmc has nothing behind take only the value that changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictInt
from pydantic_core import PydanticCustomError

from hmc.first_fault import FirstFault

_MOST_CHOICES = 128
_MOST_LOGPROBS = 20

Ids = list[StrictInt]
Amount = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Stops = Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]]


class Body(FirstFault):
    """Strict about unknown fields."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    """What a stream says besides the answer."""

    include_usage: StrictBool = False


class Sampling(Body):
    """What every request for tokens may say; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`
    and `return_token_ids` are additions to OpenAI's fields.
    """

    model: str
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Amount | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    seed: Amount | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=_MOST_CHOICES)] = 1
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool = False
    return_token_ids: StrictBool = False
    user: str | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | Ids | list[Ids]
    max_tokens: Amount = 16
    echo: StrictBool = False
    logprobs: Annotated[int, Field(strict=True, ge=0, le=_MOST_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class TextPart(Body):
    """A part of a message's content; only text is known."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """Which function an assistant called, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call an assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def _text_alone(content: Any) -> Any:
    """Say of an image or a sound that it is one, not that it is no text."""
    parts = content if isinstance(content, list) else ()
    kinds = (part.get("type") for part in parts if isinstance(part, dict))
    if other := next((kind for kind in kinds if isinstance(kind, str) and kind != "text"), ""):
        message = "a part of type '{kind}': models read text alone here"
        raise PydanticCustomError("text_alone", message, {"kind": other[:64]})
    return content


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart], BeforeValidator(_text_alone)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


class Function(Body):
    """A function that a model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """A function's name."""

    name: str


class NamedChoice(Body):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A JSON schema for the answer."""

    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=_MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    response_format: ResponseFormat | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or a conversation in the model's chat form."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: StrictBool = True


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids
