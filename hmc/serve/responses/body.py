"""Bodies of OpenAI's Responses interface; docs/serving.md says what becomes of each field."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StrictBool

from hmc.serve.bodies import Effort, Schema, StreamOptions, ToolChoice
from hmc.serve.extras import Extras, of_kinds
from hmc.serve.fields import Body, Whole

_KEPT = "nothing is kept here: messages, function calls, their outputs and reasoning are known"


class InputText(Body):
    """A part of a message or of a function's output."""

    unused = frozenset({"annotations", "logprobs", "parsed", "prompt_cache_breakpoint"})

    type: Literal["input_text", "output_text", "text"]
    text: str


def _refusals_as_text(content: Any) -> Any:
    """A refusal of an earlier answer is text."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "output_text", "text": part.get("refusal")}
        if isinstance(part, dict) and part.get("type") == "refusal"
        else part
        for part in content
    ]


Texts = Annotated[
    str | list[InputText],
    of_kinds({"input_text", "output_text", "text"}, "a part", "models read text alone here"),
    BeforeValidator(_refusals_as_text),
]


class InputMessage(Body):
    """A message, of an earlier answer too."""

    unused = frozenset({"id", "status", "phase"})

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts


class FunctionCall(Body):
    """A call of an earlier answer; `arguments` is JSON text."""

    unused = frozenset({"id", "status", "caller", "created_by", "parsed_arguments", "async"})
    neutral: ClassVar = {"namespace": ("",)}

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutput(Body):
    """What a call gave."""

    unused = frozenset({"id", "status", "caller", "created_by", "name"})

    type: Literal["function_call_output"]
    call_id: str
    output: Texts


class Said(Body):
    """A text of a thought or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Body):
    """A thought of an earlier answer: its text, or what carries it."""

    unused = frozenset({"id", "status"})

    type: Literal["reasoning"]
    content: list[Said] = Field(default_factory=list)
    summary: list[Said] = Field(default_factory=list)
    encrypted_content: str | None = None


Item = Annotated[
    InputMessage | FunctionCall | FunctionOutput | ReasoningItem, Field(discriminator="type")
]
_ITEMS = of_kinds(
    {"message", "function_call", "function_call_output", "reasoning"},
    "an item",
    _KEPT,
    default="message",
)


class FunctionTool(Body):
    """A function of the client's."""

    unused = frozenset({"output_schema", "async"})
    neutral: ClassVar = {"defer_loading": (False,), "allowed_callers": (["direct"],)}

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^\S+$", max_length=256)]
    description: str | None = None
    parameters: Schema | None = None
    strict: StrictBool | None = None


class Format(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: StrictBool | None = None
    description: str | None = None


class TextConfig(Body):
    """How the answer is written."""

    format: Format = Field(default_factory=lambda: Format(type="text"))
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """How hard the model thinks; thoughts come whole, so there are no summaries."""

    unused = frozenset({"generate_summary", "context", "mode"})

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesBody(Extras):
    """POST /v1/responses."""

    unused = frozenset(
        {
            *("user", "store", "service_tier", "safety_identifier", "max_tool_calls", "moderation"),
            *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        }
    )
    neutral: ClassVar = {
        "background": (False,),
        "conversation": (),
        "previous_response_id": (),
        "prompt": (),
        "context_management": ([],),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
    }

    model: str | None = None
    input: Annotated[str | list[Item], Field(min_length=1), _ITEMS]
    instructions: str | None = None
    tools: Annotated[
        list[FunctionTool],
        of_kinds({"function"}, "a tool", "this server has none of its own"),
    ] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool = True
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None = None
    text: TextConfig = Field(default_factory=TextConfig)
    reasoning: Reasoning = Field(default_factory=Reasoning)
    metadata: dict[str, str] = Field(default_factory=dict)
    include: list[
        Literal[
            "reasoning.encrypted_content",
            "file_search_call.results",
            "web_search_call.results",
            "web_search_call.action.sources",
            "message.input_image.image_url",
            "computer_call_output.output.image_url",
            "code_interpreter_call.outputs",
        ]
    ] = Field(default_factory=list)
    stream_options: StreamOptions | None = None
