"""What a request may not hold is named, whatever model is served."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from hmc.serve import bodies, extras
from hmc.serve.bodies import Body, ChatBody, TokenizeBody
from hmc.serve.faults import of_validation
from hmc.serve.messages import body as of_messages
from hmc.serve.responses import body as of_responses

HOMES = (bodies, extras, of_messages, of_responses)


def _forms(home: ModuleType) -> Iterator[type[Body]]:
    for each in vars(home).values():
        if isinstance(each, type) and issubclass(each, Body) and each.__module__ == home.__name__:
            yield each


OWN_WORDS = {"type", "text", "role", "id", "function"}
"""Of the objects within messages and tools."""
PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
WORDS = {"type": "text", "text": "What is this?"}


@pytest.mark.parametrize("form", [ChatBody, TokenizeBody])
@pytest.mark.parametrize(
    ("parts", "kind"), [([WORDS, IMAGE], "image_url"), ([SOUND], "input_audio")]
)
def test_an_image_is_a_bad_request(form: type[Body], parts: list[Any], kind: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": parts}]}
    with pytest.raises(ValidationError) as caught:
        form.model_validate_json(json.dumps(body))
    answer = of_validation(caught.value)
    assert (answer.status, answer.param) == (400, "messages.0.content")
    assert answer.message == (
        f"messages.0.content: a part of type '{kind}': models read text alone here"
    )


def test_parts_of_text_are_one_text() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": [WORDS, WORDS]}]}
    content = ChatBody.model_validate(body).messages[0].content
    assert isinstance(content, list) and [part.text for part in content] == [WORDS["text"]] * 2


@pytest.mark.parametrize("form", [form for home in HOMES for form in _forms(home)])
def test_every_field_is_on_the_page(form: type[Body]) -> None:
    fields = {each.alias or name for name, each in form.model_fields.items()}
    told = set(re.findall(r"[`.\"](\w+)(?=[`\[\"])", PAGE))
    assert not (fields | form.unused | set(form.neutral)) - told - OWN_WORDS
