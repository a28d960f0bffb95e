"""Bodies of Anthropic's Messages interface; docs/serving.md says what becomes of each field."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool

from hmc.serve.bodies import Schema, Stops
from hmc.serve.extras import Extras, of_kinds
from hmc.serve.fields import Body, Whole

_MOST_STOPS = 16
_READ = "models read text, thoughts and calls of tools alone here"
_TEXT = of_kinds({"text"}, "a block", "models read text alone here")


class TextBlock(Body):
    """A text."""

    unused = frozenset({"cache_control", "citations", "parsed_output"})

    type: Literal["text"]
    text: str


Texts = Annotated[str | list[TextBlock], _TEXT]


class ThinkingBlock(Body):
    """A thought of an earlier answer; one that was left out is in its signature."""

    type: Literal["thinking"]
    thinking: str = ""
    signature: str = ""


class RedactedBlock(Body):
    """A thought that only its maker can read."""

    type: Literal["redacted_thinking"]
    data: str = ""


class ToolUseBlock(Body):
    """A call that an assistant made."""

    unused = frozenset({"cache_control", "caller", "toolset_name"})

    type: Literal["tool_use"]
    id: str
    name: str
    input: Any = Field(default_factory=dict)


class ToolResultBlock(Body):
    """What a call gave."""

    unused = frozenset({"cache_control", "toolset_name"})

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = ""
    is_error: StrictBool = False


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
_BLOCKS = of_kinds(
    {"text", "thinking", "redacted_thinking", "tool_use", "tool_result"}, "a block", _READ
)


class Turn(Body):
    """One message; a whole answer is one, too."""

    unused = frozenset(
        {
            *("id", "type", "model", "stop_reason", "stop_sequence", "stop_details", "usage"),
            *("container", "diagnostics"),
        }
    )

    role: Literal["user", "assistant", "system"]
    content: Annotated[str | list[Block], _BLOCKS]


class ClientTool(Body):
    """A function of the client's."""

    unused = frozenset({"cache_control", "eager_input_streaming", "input_examples"})
    neutral: ClassVar = {"defer_loading": (False,), "allowed_callers": (["direct"],)}

    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(pattern=r"^\S+$", max_length=256)]
    description: str | None = None
    input_schema: Schema
    strict: StrictBool | None = None


class Choice(Body):
    """What has to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: StrictBool = False


class Thinking(Body):
    """Whether the model thinks aloud; `budget_tokens` is without effect."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[Whole, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] = "summarized"


class OutputFormat(Body):
    """A JSON schema for the answer."""

    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]


class OutputConfig(Body):
    """How the answer is written."""

    neutral: ClassVar = {"task_budget": ()}

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens: a conversation."""

    unused = frozenset(
        {
            *("metadata", "service_tier", "cache_control", "inference_geo", "speed", "betas"),
            *("user_profile_id", "workspace_id", "diagnostics", "context_management"),
        }
    )
    neutral: ClassVar = {"container": (), "mcp_servers": ([],), "compaction": (), "thread": ()}

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Texts | None = None
    tools: Annotated[
        list[ClientTool],
        of_kinds({"custom"}, "a tool", "this server has none of its own", default="custom"),
    ] = Field(default_factory=list)
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class MessagesBody(Extras, CountBody):
    """POST /v1/messages."""

    unused = CountBody.unused
    neutral: ClassVar = CountBody.neutral

    max_tokens: Annotated[Whole, Field(ge=1)]
    stop_sequences: Annotated[Stops, Field(max_length=_MOST_STOPS)] | None = None
