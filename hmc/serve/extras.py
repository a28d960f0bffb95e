"""What requests of every interface may say besides its own fields, under the names that chats have
for it.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from pydantic import BeforeValidator, Field, StrictBool
from pydantic_core import PydanticCustomError

from hmc.serve.bodies import Biases, ChatBody, Seed, StructuredOutputs, TopK
from hmc.serve.fields import Amount, Body, Number


class Extras(Body):
    """hmc's own, for interfaces that lack them."""

    temperature: Number | None = None
    top_p: Number | None = None
    top_k: TopK | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: Biases | None = None
    seed: Seed | None = None
    stop_token_ids: list[Amount] | None = None
    ignore_eos: StrictBool = False
    stream: StrictBool = False
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


def as_chat(body: Body, **fields: Any) -> ChatBody:
    """The request that chats have: `fields`, and what a body says of `Extras`."""
    said = {
        name: getattr(body, name)
        for name in Extras.model_fields
        if name in body.model_fields_set and name not in fields
    }
    return ChatBody(**said, **fields)


def of_kinds(known: Set[str], what: str, why: str, *, default: str = "") -> BeforeValidator:
    """Refuses an object of another kind than those `known` by the name of its `type`; one without a
    type is of the kind `default`, where there is one.
    """
    message = f"{what} of type '{{kind}}': {why}"

    def check(given: Any) -> Any:
        if not isinstance(given, list):
            return given
        found = []
        for each in given:
            if default and isinstance(each, dict) and each.get("type") is None:
                each = {**each, "type": default}
            kind = each.get("type") if isinstance(each, dict) else None
            if isinstance(kind, str) and kind not in known:
                raise PydanticCustomError("kind", message, {"kind": kind[:64]})
            found.append(each)
        return found

    return BeforeValidator(check)
