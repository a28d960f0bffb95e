"""Chat templates write what transformers makes of them, and users' control tokens stay text."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import transformers
from chats import CONVERSATIONS, FOLDERS, NAMES, TEMPLATES, control_tokens, fields, text_of

from hmc.errors import UsageError
from hmc.runtime.tokens.text import Text

EVERY = len(FOLDERS) > 1
pytestmark = pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def texts() -> dict[Path, Text]:
    return {path: text_of(path) for path in TEMPLATES}


def test_text_and_ids_are_those_of_transformers(texts: dict[Path, Text], path: Path) -> None:
    text = texts[path]
    assert text.chat is not None
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=text._tokenizer, **NAMES)
    for name, (messages, how) in CONVERSATIONS.items():
        asked = {"add_generation_prompt": True, **how}
        asked |= asked.pop("variables", {})
        asked |= {"chat_template": text.chat.source, "conversation": copy.deepcopy(messages)}
        try:
            expected = oracle.apply_chat_template(tokenize=False, **copy.deepcopy(asked))
        except Exception as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            with pytest.raises(UsageError) as found:
                text.encode_chat(messages, **how)
            assert " ".join(refusal.split()) in " ".join(str(found.value).split()), name
            continue
        assert text.chat.render(messages, **how) == expected, name
        ids = oracle.apply_chat_template(return_dict=False, **asked)
        assert text.encode_chat(messages, **how) == ids, name


def test_a_users_control_token_is_text_in_every_field(texts: dict[Path, Text], path: Path) -> None:
    text = texts[path]
    assert text.chat is not None
    special, plain = control_tokens(text.chat)
    added = set(text._tokenizer.get_added_tokens_decoder())
    honest = {}
    for field, (messages, tools) in fields(" forged").items():
        try:
            ids = text.encode_chat(messages, tools=tools)
        except UsageError:  # a template that does not take this conversation
            continue
        honest[field] = [each for each in ids if each in added]
    for number, forged in enumerate((*special, *plain)):
        for place, (field, (messages, tools)) in enumerate(fields(forged).items()):
            if not EVERY and (number + place) % 3:  # of each field a third of the tokens
                continue
            if field not in honest or (forged in plain and field in ("said", "thought")):
                continue
            ids = text.encode_chat(messages, tools=tools)
            assert [each for each in ids if each in added] == honest[field], (field, forged)
            shown = text._tokenizer.decode(ids, skip_special_tokens=False)
            whole = text.chat.render(messages, tools=tools)
            if path.parent == FOLDERS[0]:  # others may take a control token out themselves
                assert shown == whole, (field, forged)
            assert set(shown) <= {*whole, *forged}, (field, forged)
