"""Bodies as clients send them, and what becomes of each: fields x values from the specifications of
OpenAI, vLLM and llama-server, and from what the clients of these do.
"""

from __future__ import annotations

import json
from typing import Any

USER: Any = {"role": "user", "content": "Who is the Lord?"}
CALL: Any = {"id": "c1", "type": "function", "function": {"name": "ark", "arguments": "{}"}}
RESULT: Any = {"role": "tool", "content": "300 cubits", "tool_call_id": "c1"}
SCHEMA: Any = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
IMAGE: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def tool(name: str = "ark", **more: Any) -> dict[str, Any]:
    """A tool as OpenAI has it."""
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


def chain(links: int, *, circle: bool = False) -> dict[str, Any]:
    """A schema whose references follow each other, each a property deeper than the last."""
    last = {"$ref": "#/$defs/a0"} if circle else {"type": "integer"}
    links_ = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}}
        for i in range(links)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**links_, f"a{links}": last}}


ROUND: Any = {
    "$ref": "#/$defs/a",
    "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
}
LIST: Any = {  # recursion that holds something is fine
    "type": "object",
    "properties": {"next": {"$ref": "#"}, "const": {"type": "integer"}},
    "additionalProperties": False,
}


def form(schema: Any) -> dict[str, Any]:
    """A response_format."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def said(**more: Any) -> list[Any]:
    """A conversation with an answer that has these fields besides."""
    return [USER, {"role": "assistant", "content": "He is.", **more}, USER]


def called(**more: Any) -> list[Any]:
    """A conversation with a call that has these fields besides."""
    return [USER, {"role": "assistant", "content": None, "tool_calls": [CALL | more]}, RESULT]


def with_arguments(arguments: Any) -> list[Any]:
    """A conversation with a call of these arguments."""
    return called(function={"name": "ark", "arguments": arguments})


def parts(*given: Any) -> list[Any]:
    """A conversation whose content comes in parts."""
    return [{"role": "user", "content": list(given)}]


WORDS: Any = {"type": "text", "text": "Who?"}

# Fields that every request may have -> values taken, values refused by the field's name.
COMMON: dict[str, tuple[list[Any], list[Any]]] = {
    "model": ([None, "tiny"], [7]),
    "max_tokens": ([None, 1, 2.0], [1.5, -2, "1", True]),
    "max_completion_tokens": ([None, 1, 1.0], [0.5, "1"]),
    "n_predict": ([1], [[]]),
    "temperature": ([None, 0, 0.7, 2], [-1, "hot", True]),
    "top_p": ([None, 0, 0.5, 1, 1.0], [-0.1, 1.1]),
    "top_k": ([None, -1, 0, 40, 40.0], [-2, 0.5]),
    "min_p": ([0, 0.05, None], [2]),
    "repetition_penalty": ([1.1, None], [0, "x"]),
    "repeat_penalty": ([1.0, 1.1], [0]),
    "frequency_penalty": ([None, 0, 0.5, -2, 2], [2.5, "x"]),
    "presence_penalty": ([None, 0, 1.5, -2], [-3, True]),
    "logit_bias": (
        [None, {}, {"50": 5, "51": -100}, {"7": 100.0}],
        [{"x": 1}, {"5": 101}, {"99999": 1}, {"-1": 1}, [[5, 1]]],
    ),
    "seed": ([None, 0, 7, -1, -9, 42.0, 2**63 - 1], [0.5, "7"]),
    "stop": ([None, "", [], "\n", ["a", ""], ["\n\n", "###"]], [[1], 5, ["x"] * 17]),
    "stop_token_ids": ([None, [], [5]], [["x"], [-1], 5]),
    "n": ([None, 1, 1.0, 2], [0, 129, 1.5, "1"]),
    "stream": ([None, False], ["true", 1]),
    "stream_options": ([None], [{"include_usage": True}]),
    "user": ([None, "me"], []),
    "store": ([None, True, False], []),
    "metadata": ([None, {"a": "b"}], []),
    "service_tier": (["auto", "flex"], []),
    "safety_identifier": (["x"], []),
    "prompt_cache_key": (["x"], []),
    "cache_prompt": ([True, False], []),
    "id_slot": ([-1], []),
    "ignore_eos": ([True, None], ["x"]),
    "return_token_ids": ([True, None], ["x"]),
    "min_tokens": ([0, None], [5]),
    "use_beam_search": ([False], [True]),
    "length_penalty": ([1.0, 1], [0.5]),
    "skip_special_tokens": ([True], [False]),
    "spaces_between_special_tokens": ([True, False], []),
    "include_stop_str_in_output": ([False], [True]),
    "bad_words": ([[], None], [["x"]]),
    "allowed_token_ids": ([None], [[1]]),
    "prompt_logprobs": ([None], [1]),
    "truncate_prompt_tokens": ([None], [5]),
    "priority": ([0], [1]),
    "cache_salt": ([None], ["x"]),
    "logits_processors": ([None, []], [["x"]]),
    "best_of": ([None, 1], [2]),
    "mirostat": ([0], [2]),
    "typical_p": ([1, 1.0], [0.5]),
    "dry_multiplier": ([0, 0.0], [0.8]),
    "xtc_probability": ([0.0], [0.5]),
    "grammar": ([None, ""], ['root ::= "yes"']),
    "response_format": (
        [
            None,
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_object", "schema": SCHEMA},
            form(SCHEMA),
            form(LIST),
            form(chain(60)),
            form(chain(3, circle=True)),
            {"type": "json_schema", "json_schema": {"name": "x"}},
        ],
        [
            {"type": "xml"},
            {"type": "json_schema"},
            {"type": "structural_tag", "format": {}},
        ],
    ),
    "structured_outputs": (
        [
            None,
            {"json": SCHEMA},
            {"json": json.dumps(SCHEMA)},
            {"json_object": True},
            {"regex": "[a-z]{3}"},
            {"choice": ["yes", "no"]},
        ],
        [{"grammar": "x"}, {"structural_tag": "x"}, {"json": "{"}, {"choice": []}],
    ),
    "guided_json": ([None, SCHEMA, json.dumps(SCHEMA)], ["[", 5]),
    "guided_regex": (["a+"], [5, "a" * 9000]),
    "guided_choice": ([["yes", "no"]], [[], ["x"] * 5000]),
    "guided_grammar": ([None], ["x"]),
    "guided_decoding_backend": (["auto"], []),
    "json_schema": ([SCHEMA], [5]),
}

CHAT: dict[str, tuple[list[Any], list[Any]]] = {
    "messages": (
        [
            [USER],
            [{"role": "system", "content": "Be brief."}, USER],
            [{"role": "developer", "content": "Be brief."}, USER],
            [{**USER, "name": "Job"}],
            [{**USER, "cache_control": {"type": "ephemeral"}}],
            [{**USER, "id": "m1", "createdAt": "now"}],
            parts(WORDS),
            parts(WORDS, WORDS),
            parts({**WORDS, "cache_control": {"type": "ephemeral"}}),
            said(),
            said(refusal=None, annotations=[], audio=None, function_call=None, tool_calls=None),
            said(annotations=None),
            said(tool_calls=[]),
            said(reasoning_content="He is one."),
            said(reasoning="He is one."),
            said(reasoning_content=None, reasoning=None),
            said(reasoning_details=[{"type": "reasoning.text", "text": "x"}]),
            said(content=[WORDS]),
            said(content=[{"type": "refusal", "refusal": "No."}]),
            said(content=None),
            said(content=""),
            called(),
            called(index=0),
            called(id=None),
            called(extra_content={"google": {}}),
            with_arguments('{"a": 1}'),
            with_arguments({"a": 1}),
            with_arguments({}),
            with_arguments(""),
            with_arguments("no JSON"),
            [*called()[:2], {**RESULT, "name": "ark"}],
            [*called()[:2], {**RESULT, "content": [WORDS]}],
        ],
        [
            None,
            [],
            "Who?",
            [{"content": "x"}],
            [{"role": "wizard", "content": "x"}],
            [{"role": "user"}],
            [{"role": "user", "content": 5}],
            parts(IMAGE),
            parts({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
            said(audio={"id": "a"}),
            said(function_call={"name": "ark", "arguments": "{}"}),
            said(reasoning={"text": "x"}),
            called(type="custom"),
            with_arguments(5),
        ],
    ),
    "tools": (
        [
            None,
            [],
            [tool()],
            [tool("mcp:ark/find.one-2")],
            [tool(strict=True), tool("dove", strict=None, description=None)],
            [tool(parameters=None)],
            [tool(parameters={})],
            [{**tool(), "cache_control": {"type": "ephemeral"}}],
            [tool(response={"type": "string"})],
            [{"function": {"name": "ark"}}],
        ],
        [
            {},
            [{"type": "web_search"}],
            [{"type": "custom", "custom": {"name": "x"}}],
            [tool("")],
            [tool("two words")],
            [tool(parameters="x")],
        ],
    ),
    "tool_choice": (
        [None, "none", "auto", {"type": "auto"}, {"type": "none"}],
        [
            "required",
            "any",
            "sometimes",
            {"type": "allowed_tools"},
            {"type": "tool", "name": "ark"},
        ],
    ),
    "functions": ([None, []], [[{"name": "ark"}]]),
    "function_call": ([None, "none", "auto"], [{"name": "ark"}]),
    "parallel_tool_calls": ([None, True, False], ["x"]),
    "max_tokens": ([-1], [0]),
    "max_completion_tokens": ([-1], []),
    "logprobs": ([None, True, False], [5]),
    "top_logprobs": ([None, 0], [3, 21, -1]),
    "modalities": ([None, ["text"]], [["text", "audio"]]),
    "audio": ([None], [{"voice": "ash", "format": "wav"}]),
    "prediction": ([{"type": "content", "content": "x"}], []),
    "web_search_options": ([None], [{}]),
    "verbosity": (["low", None], []),
    "reasoning_effort": ([None, "none", "minimal", "low", "high", "xhigh"], ["huge", 5]),
    "include_reasoning": ([True, False, None], ["x"]),
    "reasoning_format": (["none", "auto", "deepseek"], ["other"]),
    "thinking_token_budget": ([None], [100]),
    "chat_template_kwargs": (
        [None, {}, {"enable_thinking": False}, {"anything": [1]}],
        [{"messages": []}, {"tools": []}, 5],
    ),
    "chat_template": ([None], ["{{ messages }}"]),
    "documents": ([None, [{"title": "a", "text": "b"}]], ["x"]),
    "add_generation_prompt": ([None, True, False], ["x"]),
    "continue_final_message": ([None, False], [True, "x"]),
    "echo": ([False], [True]),
    "add_special_tokens": ([False], [True]),
}

COMPLETION: dict[str, tuple[list[Any], list[Any]]] = {
    "prompt": (
        ["Who?", ["Who?"], ["Who?", "What?"], [5, 6], [[5], [6, 7]]],
        [None, "", [], [[]], {}, [1.5], [True], [[5, 99999]]],
    ),
    "echo": ([None, True, False], ["x"]),
    "logprobs": ([None, 0, 3, 3.0], [True, 21, -1]),
    "suffix": ([None, ""], ["x"]),
    "max_tokens": ([], [0]),
    "add_special_tokens": ([True, False], ["x"]),
}

# Several fields together, and what is named in a refusal ("" where they are taken).
TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"tools": [], "tool_choice": "auto"}, ""),
    ({"tools": [tool()], "tool_choice": "any"}, ""),
    ({"tools": [tool()], "tool_choice": {"type": "any"}}, ""),
    ({"tools": [tool()], "tool_choice": "required"}, ""),
    ({"tools": [tool()], "tool_choice": {"type": "tool", "name": "ark"}}, ""),
    ({"tools": [tool()], "tool_choice": {"type": "function", "name": "ark"}}, ""),
    ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "no"),
    ({"tools": [tool(parameters=chain(200))], "tool_choice": "required"}, "levels"),
    ({"tools": [tool(parameters=ROUND)], "tool_choice": "required"}, "leads back"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, ""),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ({"max_tokens": 5000}, "context"),
    ({"logprobs": True, "top_logprobs": 2}, ""),
    ({"stream": True, "stream_options": {"include_usage": True}}, ""),
    ({"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}}, ""),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, ""),
    ({"messages": said()[:2], "continue_final_message": True}, ""),
    (
        {
            "messages": said()[:2],
            "continue_final_message": True,
            "add_generation_prompt": True,
        },
        "add_generation_prompt",
    ),
    ({"messages": called()[:2], "continue_final_message": True}, "without tool calls"),
    ({"response_format": form(SCHEMA), "guided_json": SCHEMA}, "guided_json"),
    ({"response_format": {"type": "text"}, "guided_regex": "a"}, ""),
    ({"response_format": form(ROUND)}, "leads back to itself"),
    ({"response_format": form({"$ref": "#"})}, "leads back to itself"),
    ({"response_format": form(chain(1000))}, "levels"),
    ({"response_format": form({"$ref": "#/$defs/none"})}, "leads nowhere"),
    ({"response_format": form({"$ref": "https://example.com/x"})}, "no way within it"),
    ({"response_format": form({"type": "no such type"})}, "schema cannot be used"),
    ({"guided_regex": "("}, "cannot be used"),
]


def table() -> list[tuple[str, dict[str, Any], str]]:
    """(route, body, what a refusal names, or "" where there is none)."""
    chat: Any = {"model": "tiny", "messages": [USER], "max_tokens": 1}
    completion: Any = {"model": "tiny", "prompt": "Who?", "max_tokens": 1}
    found = []
    for route, base, rows in (
        ("chat/completions", chat, COMMON),
        ("chat/completions", chat, CHAT),
        ("completions", completion, COMPLETION),
    ):
        for field, (taken, refused) in rows.items():
            rest = dict(base)
            if "max_" in field:  # as many as fit are one by a letter that comes soon
                rest = {**rest, "max_tokens": None, "stop": ["e", "o"]}
            found += [(route, {**rest, field: value}, "") for value in taken]
            found += [(route, {**rest, field: value}, field) for value in refused]
    return found + [("chat/completions", chat | more, named) for more, named in TOGETHER]
