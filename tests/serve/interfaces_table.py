"""Bodies of Anthropic's Messages and OpenAI's Responses as their clients send them, and what
becomes of each: fields x values of the clients' own types.
"""

from __future__ import annotations

from typing import Any

from bodies_table import ROUND, SCHEMA

USER: Any = {"role": "user", "content": "Who is the Lord?"}
WORDS: Any = {"type": "text", "text": "Who?"}
IMAGE: Any = {"type": "image", "source": {"type": "base64", "data": "", "media_type": "image/png"}}
CALL: Any = {"type": "tool_use", "id": "t1", "name": "ark", "input": {"a": 1}}
RESULT: Any = {"type": "tool_result", "tool_use_id": "t1", "content": "300 cubits"}
ARK: Any = {"name": "ark", "input_schema": SCHEMA}
CACHED: Any = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}

INPUT_TEXT: Any = {"type": "input_text", "text": "Who?"}
FUNCTION: Any = {"type": "function", "name": "ark", "parameters": SCHEMA, "strict": True}
CALLED: Any = {"type": "function_call", "call_id": "c1", "name": "ark", "arguments": "{}"}
OUTPUT: Any = {"type": "function_call_output", "call_id": "c1", "output": "300 cubits"}
SAID: Any = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "phase": None,
    "content": [{"type": "output_text", "text": "He is.", "annotations": [], "logprobs": []}],
}


def turns(*blocks: Any) -> list[Any]:
    """A conversation whose answer consists of blocks."""
    return [USER, {"role": "assistant", "content": list(blocks)}, USER]


def asked(*blocks: Any) -> list[Any]:
    """A question that consists of blocks."""
    return [{"role": "user", "content": list(blocks)}]


def resulted(**more: Any) -> list[Any]:
    """A conversation with the result of a call."""
    answer = {"role": "assistant", "content": [CALL | CACHED]}
    return [USER, answer, {"role": "user", "content": [{**RESULT, **more}]}]


# Fields -> values taken, values refused by the field's name or what else is told.
MESSAGES: dict[str, tuple[list[Any], list[tuple[Any, str]]]] = {
    "model": (["tiny", None], [(7, "model")]),
    "max_tokens": ([1, 1.0], [(None, "max_tokens"), (0, "max_tokens"), (-1, "max_tokens")]),
    "messages": (
        [
            [USER],
            [USER, USER],
            [USER, {"role": "assistant", "content": "He"}],
            [{"role": "system", "content": "Be brief."}, USER],
            asked(WORDS, WORDS | CACHED),
            turns(WORDS),
            turns({**WORDS, "citations": None, "parsed_output": None}),
            turns({"type": "thinking", "thinking": "He is one.", "signature": "x"}, WORDS),
            turns({"type": "thinking", "thinking": "", "signature": "x"}, WORDS),
            turns({"type": "redacted_thinking", "data": "x"}, WORDS),
            resulted(),
            resulted(content=None),
            resulted(content=[WORDS], is_error=True, **CACHED),
            resulted()[:2] + asked(RESULT, WORDS),
        ],
        [
            (None, "messages"),
            ([], "messages"),
            ("Who?", "messages"),
            ([{"role": "tool", "content": "x"}], "role"),
            ([{"role": "user"}], "content"),
            (asked(), "messages.0.content"),
            (asked(WORDS, IMAGE), "image"),
            (asked({"type": "document", "source": {}}), "document"),
            (resulted(content=[IMAGE]), "image"),
            (turns({"type": "server_tool_use", "id": "s", "name": "x"}), "server_tool_use"),
            (turns(RESULT), "tool_result"),
            (asked(CALL), "tool_use"),
            (turns({"type": "tool_use", "id": "t1"}), "name"),
            (resulted()[:2], "tool_result is missing"),
        ],
    ),
    "system": (
        ["Be brief.", [WORDS | CACHED, WORDS], [], None],
        [(5, "system"), ([IMAGE], "image")],
    ),
    "stop_sequences": ([[], ["a", ""], None], [(["x"] * 17, "stop_sequences"), (5, "stop_seq")]),
    "temperature": ([0, 1, None], [(-1, "temperature"), ("hot", "temperature")]),
    "top_p": ([0.9], [(2, "top_p")]),
    "top_k": ([5, 0], [("x", "top_k")]),
    "metadata": ([{"user_id": "me"}], []),
    "service_tier": (["auto"], []),
    "cache_control": ([{"type": "ephemeral"}], []),
    "context_management": ([{"edits": []}], []),
    "container": ([None], [("c", "container")]),
    "mcp_servers": ([[]], [([{"url": "x"}], "mcp_servers")]),
    "thinking": (
        [
            {"type": "enabled", "budget_tokens": 1024},
            {"type": "adaptive", "display": "omitted"},
            {"type": "disabled"},
        ],
        [({"type": "between_tools"}, "thinking"), ({"budget_tokens": 5}, "thinking")],
    ),
    "output_config": (
        [{"effort": "high"}, {"format": {"type": "json_schema", "schema": SCHEMA}}],
        [
            ({"effort": "huge"}, "effort"),
            ({"format": {"type": "json_schema", "schema": ROUND}}, "leads back"),
            ({"task_budget": {"tokens": 5}}, "task_budget"),
        ],
    ),
    "tools": (
        [
            [],
            [ARK],
            [{**ARK, "type": "custom", "description": "x", "strict": True, **CACHED}],
            [{**ARK, "eager_input_streaming": True, "defer_loading": False}],
        ],
        [
            ([SEARCH], "web_search_20250305"),
            ([{"name": "ark"}], "input_schema"),
            ([{**ARK, "name": "two words"}], "name"),
            ([{**ARK, "defer_loading": True}], "defer_loading"),
        ],
    ),
    "tool_choice": (
        [{"type": "auto", "disable_parallel_tool_use": True}, {"type": "none"}],
        [
            ({"type": "any"}, "tool_choice"),
            ({"type": "tool"}, "tool_choice"),
            ({"type": "tool", "name": "ark"}, "ark"),
            ("auto", "tool_choice"),
        ],
    ),
    "structured_outputs": ([{"choice": ["yes"]}], [({"grammar": "x"}, "grammar")]),
}

RESPONSES: dict[str, tuple[list[Any], list[tuple[Any, str]]]] = {
    "model": (["tiny", None], [(7, "model")]),
    "input": (
        [
            "Who?",
            [USER],
            [{**USER, "type": "message"}],
            [{"role": "developer", "content": "Be brief."}, USER],
            [{"role": "user", "content": [INPUT_TEXT, INPUT_TEXT]}],
            [USER, SAID, USER],
            [USER, {**SAID, "content": [{"type": "refusal", "refusal": "No."}]}, USER],
            [USER, CALLED, OUTPUT],
            [USER, {**CALLED, "id": "fc_1", "status": "completed", "caller": None}, OUTPUT],
            [USER, CALLED, {**OUTPUT, "output": [INPUT_TEXT]}],
            [USER, {"type": "reasoning", "id": "rs_1", "summary": []}, SAID, USER],
            [USER, {"type": "reasoning", "encrypted_content": "x", "content": None}, SAID, USER],
        ],
        [
            (None, "input"),
            ("", "input"),
            ([], "input"),
            ([{"type": "item_reference", "id": "msg_1"}], "item_reference"),
            ([{"type": "web_search_call", "id": "ws_1"}], "web_search_call"),
            ([{"role": "user", "content": [{"type": "input_image"}]}], "input_image"),
            ([{"role": "user", "content": [{"type": "input_text"}]}], "content.0.text"),
            ([{"role": "user", "content": [{"type": "input_file"}]}], "input_file"),
            ([{"role": "tool", "content": "x"}], "role"),
            ([USER, {**CALLED, "arguments": None}], "arguments"),
            ([USER, CALLED, {**OUTPUT, "output": [{"type": "input_image"}]}], "input_image"),
        ],
    ),
    "instructions": (["Be brief.", "", None], [(5, "instructions")]),
    "max_output_tokens": ([1], [(0, "max_output_tokens"), (5000, "max_output_tokens")]),
    "temperature": ([0, None], [(-1, "temperature")]),
    "top_p": ([1.0], [("x", "top_p")]),
    "metadata": ([{"a": "b"}, {}, None], [({"a": 1}, "metadata")]),
    "store": ([True, False, None], []),
    "user": (["me"], []),
    "previous_response_id": ([None], [("resp_1", "previous_response_id")]),
    "conversation": ([None], [("conv_1", "conversation")]),
    "background": ([False, None], [(True, "background")]),
    "prompt": ([None], [({"id": "p"}, "prompt")]),
    "truncation": (["disabled"], [("auto", "truncation")]),
    "top_logprobs": ([0], [(3, "top_logprobs")]),
    "include": (
        [[], ["reasoning.encrypted_content"], ["file_search_call.results"]],
        [(["message.output_text.logprobs"], "include")],
    ),
    "reasoning": (
        [{"effort": "low", "summary": "auto"}, {"effort": "none"}, {}, None],
        [({"effort": "huge"}, "reasoning.effort")],
    ),
    "text": (
        [
            {"format": {"type": "text"}, "verbosity": "low"},
            {"format": {"type": "json_object"}},
            {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": None}},
        ],
        [
            ({"format": {"type": "json_schema", "name": "x"}}, "text.format.schema"),
            ({"format": {"type": "grammar"}}, "text.format.type"),
        ],
    ),
    "tools": (
        [[], [FUNCTION], [{**FUNCTION, "description": None, "strict": None}]],
        [
            ([{"type": "web_search"}], "web_search"),
            ([{"type": "mcp", "server_label": "x"}], "mcp"),
            ([{"type": "custom", "name": "x"}], "custom"),
            ([{"type": "function", "function": {"name": "ark"}}], "name"),
        ],
    ),
    "tool_choice": (
        ["auto", "none", None],
        [
            ("required", "tool_choice"),
            ({"type": "function", "name": "ark"}, "ark"),
            ({"type": "web_search"}, "tool_choice"),
        ],
    ),
    "parallel_tool_calls": ([True, False], [("x", "parallel_tool_calls")]),
    "stream_options": ([None], [({"include_obfuscation": False}, "stream_options")]),
}

# Several fields together, and what is named in a refusal ("" where they are taken).
TOGETHER: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"tools": [ARK], "tool_choice": {"type": "any"}, "max_tokens": 40}, ""),
    ("messages", {"tools": [ARK], "tool_choice": {"type": "tool", "name": "ark"}}, ""),
    ("messages", {"tools": [ARK], "tool_choice": {"type": "any", "name": "ark"}}, "tool_choice"),
    ("messages", {"stream": True, "stop_sequences": ["e"]}, ""),
    ("messages", {"max_tokens": 5000, "stop_sequences": ["e", "o"]}, ""),
    ("messages", {"system": "the " * 1100}, "context"),
    ("messages/count_tokens", {"tools": [ARK], "system": "Be brief.", "max_tokens": None}, ""),
    ("messages/count_tokens", {"messages": asked(IMAGE), "max_tokens": None}, "image"),
    ("responses", {"tools": [FUNCTION], "tool_choice": "required"}, ""),
    (
        "responses",
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "ark"}},
        "",
    ),
    ("responses", {"stream": True, "stream_options": {"include_obfuscation": False}}, ""),
]


def table() -> list[tuple[str, dict[str, Any], str]]:
    """(route, body, what a refusal names, or "" where there is none)."""
    bases: dict[str, Any] = {
        "messages": {"model": "tiny", "messages": [USER], "max_tokens": 1},
        "responses": {"model": "tiny", "input": "Who?", "max_output_tokens": 1},
    }
    found = []
    for route, rows in (("messages", MESSAGES), ("responses", RESPONSES)):
        for field, (taken, refused) in rows.items():
            found += [(route, {**bases[route], field: value}, "") for value in taken]
            found += [(route, {**bases[route], field: value}, told) for value, told in refused]
    return found + [
        (route, bases[route.partition("/")[0]] | more, told) for route, more, told in TOGETHER
    ]
