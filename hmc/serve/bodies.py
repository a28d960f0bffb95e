"""Bodies of requests as clients of OpenAI, vLLM and llama-server send them: every field that is
known here; docs/serving.md says what becomes of each.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt
from pydantic_core import PydanticCustomError

from hmc.serve.fields import Amount, Body, Most, Number, Whole

_MOST_CHOICES = 128
_MOST_LOGPROBS = 20
_MOST_BIAS = 100
_LONGEST_PATTERN = 8192
_MOST_TEXTS = 4096

Ids = list[StrictInt]
Stops = Annotated[
    str | list[str],
    AfterValidator(
        lambda stops: [each for each in ([stops] if isinstance(stops, str) else stops) if each]
    ),
]
"""Stop strings as a list; empty ones stop nothing."""
Seed = Annotated[Whole, AfterValidator(lambda seed: None if seed == -1 else seed % 2**64)]
"""-1 is None: another one each time."""
TopK = Annotated[Whole, Field(ge=-1), AfterValidator(lambda top_k: max(top_k, 0))]
Biases = dict[Annotated[int, Field(ge=0)], Annotated[Number, Field(ge=-_MOST_BIAS, le=_MOST_BIAS)]]
Schema = dict[str, Any]
Pattern = Annotated[str, Field(max_length=_LONGEST_PATTERN)]
Texts = Annotated[list[str], Field(min_length=1, max_length=_MOST_TEXTS)]


class StreamOptions(Body):
    """What a stream says besides the answer."""

    unused = frozenset({"include_obfuscation"})

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class StructuredOutputs(Body):
    """vLLM's constraints, of which one is given."""

    unused = frozenset(
        {"disable_fallback", "disable_any_whitespace", "disable_additional_properties"}
    )
    neutral: ClassVar = {"grammar": (), "structural_tag": (), "whitespace_pattern": ()}

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    json_object: StrictBool = False
    regex: Pattern | None = None
    choice: Texts | None = None


class JsonSchema(Body):
    """A JSON schema for the answer; without one any object will do."""

    name: str = ""
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer; `schema` beside "json_object" is llama-server's way."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None


class Sampling(Body):
    """What every request for tokens may say. Of two names for one thing the first is used."""

    unused = frozenset(
        {
            *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
            *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "moderation"),
            *("verbosity", "request_id", "session_id", "truncation_side", "stream_interval"),
            *("spaces_between_special_tokens", "guided_decoding_backend", "cache_prompt"),
            *("id_slot", "n_keep", "timings_per_token", "return_progress"),
        }
    )
    neutral: ClassVar = {
        "best_of": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "early_stopping": (False,),
        "include_stop_str_in_output": (False,),
        "min_tokens": (0,),
        "skip_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "prompt_logprobs": (),
        "logprob_token_ids": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "logits_processors": ([],),
        "priority": (0,),
        "cache_salt": (),
        "kv_transfer_params": (),
        "return_tokens_as_token_ids": (False,),
        "thinking_token_budget": (-1,),
        "repetition_detection": (),
        "watermarking": (False,),
        "guided_grammar": (),
        "guided_whitespace_pattern": (),
        "grammar": ("",),
        "mirostat": (0,),
        "typical_p": (1,),
        "tfs_z": (1,),
        "dynatemp_range": (0,),
        "xtc_probability": (0,),
        "dry_multiplier": (0,),
        "top_n_sigma": (-1, 0),
        "repeat_last_n": (-1,),
        "n_probs": (0,),
        "lora": ([],),
    }

    model: str | None = None
    max_completion_tokens: Most | None = None
    max_tokens: Most | None = None
    n_predict: Most | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: TopK | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    repeat_penalty: Annotated[Number, Field(gt=0)] | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: Biases | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stop_token_ids: list[Amount] | None = None
    n: Annotated[Whole, Field(ge=1, le=_MOST_CHOICES)] = 1
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool = False
    return_token_ids: StrictBool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Texts | None = None
    json_schema: Schema | None = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    neutral: ClassVar = {**Sampling.neutral, "suffix": ("",)}

    prompt: str | list[str] | Ids | list[Ids]
    echo: StrictBool = False
    logprobs: Annotated[Whole, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    add_special_tokens: StrictBool = True


class TextPart(Body):
    """A part of a message's content; only text is known."""

    unused = frozenset({"cache_control", "annotations"})

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """Which function an assistant called, and its arguments: JSON text, or what it stands for."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Body):
    """A call an assistant made."""

    unused = frozenset({"index"})

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


def _text_alone(content: Any) -> Any:
    """Say of an image or a sound that it is one, not that it is no text; a refusal is text."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            part = {"type": "text", "text": part.get("refusal")}
        elif isinstance(kind, str) and kind != "text":
            message = "a part of type '{kind}': models read text alone here"
            raise PydanticCustomError("text_alone", message, {"kind": kind[:64]})
        parts.append(part)
    return parts


class Message(Body):
    """One message of a conversation; `reasoning` is vLLM's name of `reasoning_content`."""

    unused = frozenset({"annotations", "cache_control", "refusal"})
    neutral: ClassVar = {"audio": (), "function_call": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart], BeforeValidator(_text_alone)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Body):
    """A function that a model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^\S+$", max_length=256)]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    unused = frozenset({"cache_control"})

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Body):
    """A function's name."""

    name: str


class NamedChoice(Body):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


def _choice(choice: Any) -> Any:
    """What has to be called in one form: clients write "any" for "required", and Anthropic's and
    the Responses interface's objects.
    """
    if isinstance(choice, dict) and "function" not in choice:
        kind, name = choice.get("type"), choice.get("name")
        if kind in ("tool", "function") and name is not None:
            return {"type": "function", "function": {"name": name}}
        choice = kind if kind in ("none", "auto", "any", "required") else choice
    return "required" if choice == "any" else choice


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedChoice, BeforeValidator(_choice)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Conversation(Body):
    """What is put before a model through its chat template."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: Effort | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool = False


class ChatBody(Sampling, Conversation):
    """POST /v1/chat/completions."""

    neutral: ClassVar = {
        **Sampling.neutral,
        "audio": (),
        "modalities": (["text"],),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "web_search_options": (),
        "echo": (False,),
        "add_special_tokens": (False,),
        "chat_template": (),
    }

    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    parallel_tool_calls: StrictBool = True
    include_reasoning: StrictBool = True
    reasoning_format: Literal["none", "auto", "deepseek"] = "auto"


class TokenizeBody(Conversation):
    """POST /tokenize: a text, or a conversation in the model's chat form."""

    unused = frozenset({"return_token_strs"})

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None  # type: ignore[assignment]
    add_special_tokens: StrictBool = True


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids
