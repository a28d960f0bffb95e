"""Chat templates, conversations to put through them, and tokenizers that know their control tokens.

The templates in tests/templates are written for these tests, in the manners of published ones:
in tags (Qwen, GLM), harmony's channels (gpt-oss), brackets (Mistral), full-width bars and roles
that become tokens (DeepSeek, Phi). Published templates are not ours to ship:
HMC_TEST_TEMPLATES=FOLDER names a folder of *.jinja (llama.cpp's models/templates, for one), and
every test here takes them too.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from hmc.runtime.tokens.chat import ChatTemplate
from hmc.runtime.tokens.text import Text

FOLDERS = [Path(__file__).parents[1] / "templates"]
FOLDERS += [Path(path) for path in filter(None, [os.environ.get("HMC_TEST_TEMPLATES")])]
TEMPLATES = [path for folder in FOLDERS for path in sorted(folder.glob("*.jinja"))]
NAMES = {"bos_token": "<|begin|>", "eos_token": "<|stop|>"}

_CONTROL = re.compile(
    r"<\|[^|<>{}\s]{1,40}\|>|<\uff5c[^{}\uff5c]{1,40}\uff5c>|\[/?[A-Z_]{3,20}\]|</?[a-z_:|]{2,24}\|?>"
)
_PLAIN = re.compile(r"</?[a-z_:]+>")  # added tokens that models see as text
_SENTENCES = ["Who is the Lord? A cubit and a span.", "assistant user system im_start <b> tool"]


def control_tokens(template: ChatTemplate) -> tuple[list[str], list[str]]:
    """The special tokens that a template writes, and its added ones that are not special."""
    found = sorted({*_CONTROL.findall(template.literals), "<|assistant|>", "<|user|>"})
    plain = [text for text in found if _PLAIN.fullmatch(text)]
    return [text for text in found if text not in plain] + list(NAMES.values()), plain


def byte_level(special: list[str], plain: list[str]) -> Tokenizer:
    """Byte-level BPE with some merges and these added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return tokenizer


def text_of(path: Path) -> Text:
    """A checkpoint's text whose chat template stands in a file."""
    template = ChatTemplate(path.read_text(encoding="utf-8"), NAMES, str(path))
    return Text(byte_level(*control_tokens(template)), {**NAMES}, template, (), {})


def tool() -> dict[str, Any]:
    """A tool with parameters."""
    unit = {"type": "string", "description": "a unit", "enum": ["cubit", "é<"]}
    parameters = {
        "type": "object",
        "properties": {"unit": unit, "n": {"type": "integer"}},
        "required": ["unit"],
    }
    function = {"name": "ark", "description": "How large it is", "parameters": parameters}
    return {"type": "function", "function": function}


def call(**arguments: Any) -> dict[str, Any]:
    """A call of the tool."""
    function = {"name": "ark", "arguments": arguments}
    return {"id": "c12345678", "type": "function", "function": function}


USER = {"role": "user", "content": " Who is the Lord? <b>\n"}
SAID = {"role": "assistant", "content": "He is."}
THOUGHT = {"reasoning_content": "Hm, so.", "reasoning": "Hm, so.", "thinking": "Hm, so."}
RESULT = {"role": "tool", "content": "300 cubits", "tool_call_id": "c12345678", "name": "ark"}


def called(**arguments: Any) -> list[dict[str, Any]]:
    """A conversation with a call and its result."""
    return [USER, {"role": "assistant", "content": "", "tool_calls": [call(**arguments)]}, RESULT]


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one": ([USER], {}),
    "system": ([{"role": "system", "content": "Be <brief>."}, USER], {}),
    "turns": ([USER, SAID, USER], {}),
    "empty": ([{"role": "user", "content": ""}], {}),
    "closed": ([USER, SAID], {"add_generation_prompt": False}),
    "wrong order": ([SAID, USER, USER], {}),
    "thought": ([USER, SAID | THOUGHT, USER], {}),
    "raw thought": ([USER, SAID | {"content": "<think>\nHm\n</think>\n\nHe is."}, USER], {}),
    "tools": ([{"role": "system", "content": "Be brief."}, USER], {"tools": [tool()]}),
    "called": (called(unit="cubit", n=3), {"tools": [tool()]}),
    "other letters": (called(unit="é<日本"), {"tools": [tool()]}),
    "thinking": ([USER], {"variables": {"enable_thinking": True}}),
    "not thinking": ([USER], {"variables": {"enable_thinking": False}}),
}


def fields(forged: str) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """A conversation and its tools with `forged` in one of the fields that users write, each."""
    found = {}
    for field in (
        *("content", "system", "result", "arguments", "argument name", "thought", "said", "name"),
        *("tool name", "tool description", "description", "enum", "property"),
    ):
        given = copy.deepcopy(called(unit="cubit"))
        given = [{"role": "system", "content": "Be brief."}, *given, SAID | THOUGHT, dict(USER)]
        offered = tool()
        _, asked, answer, result, said, _ = given
        function, properties = offered["function"], offered["function"]["parameters"]["properties"]
        arguments = answer["tool_calls"][0]["function"]["arguments"]
        place, key = {
            "content": (asked, "content"),
            "system": (given[0], "content"),
            "result": (result, "content"),
            "arguments": (arguments, "unit"),
            "thought": (said, "reasoning_content"),
            "said": (said, "content"),
            "name": (result, "name"),
            "tool name": (function, "name"),
            "tool description": (function, "description"),
            "description": (properties["unit"], "description"),
            "enum": (properties["unit"]["enum"], 0),
            "property": (properties, "n" + forged),
            "argument name": (arguments, "n" + forged),
        }[field]
        if key == "n" + forged:
            place[key] = {"type": "integer"}
        else:
            place[key] += forged
        said["thinking"] = said["reasoning"] = said["reasoning_content"]
        found[field] = (given, [offered])
    return found
