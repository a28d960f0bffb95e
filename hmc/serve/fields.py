"""What fields of bodies may hold, and reading a body: hides how unknown fields are found.

A field that is null counts as not sent. A class of bodies names, besides its fields, those that are
taken and change nothing (`unused`) and those that hmc has nothing behind, with the values that ask
for nothing (`neutral`). Any other field is unknown: it is dropped, and `read` tells of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from hmc.first_fault import FirstFault
from hmc.serve.faults import bad_request

_MOST_NAMED = 16
_LONGEST_NAME = 64


def _whole(value: Any) -> Any:
    """100.0 as 100: some clients have no whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Amount = Annotated[Whole, Field(ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Most = Annotated[Whole, Field(ge=-1)]
"""A limit of tokens; -1: as many as fit."""


class Body(FirstFault):
    """An object of a body."""

    model_config = ConfigDict(extra="allow")

    unused: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


Form = TypeVar("Form", bound=Body)


def read(form: type[Form], data: bytes) -> tuple[Form, list[str]]:
    """A body, and the places of its unknown fields, which are dropped: the first few, written so
    that they fit a header.

    Raises pydantic's `ValidationError`, and `ApiError` for a value that hmc cannot serve.
    """
    body = form.model_validate_json(data)
    unknown: list[str] = []
    for place, part in _parts(body):
        extra = part.model_extra or {}
        for name, value in extra.items():
            if name in part.unused:
                continue
            if name not in part.neutral:
                if len(unknown) < _MOST_NAMED:
                    unknown.append(
                        place + re.sub(r"[^\w.-]", "?", name[:_LONGEST_NAME], flags=re.A)
                    )
                continue
            allowed = part.neutral[name]
            if not any(value == each and type(value) in (type(each), float) for each in allowed):
                raise bad_request(
                    _refusal(place + name, allowed), place + name, "unsupported_value"
                )
        extra.clear()
    return body, unknown


def _refusal(place: str, allowed: tuple[Any, ...]) -> str:
    values = " or ".join("null" if each is None else repr(each) for each in allowed or (None,))
    return f"{place}: this server has nothing behind it: leave it out (or send {values})"


def _parts(body: Body) -> Iterator[tuple[str, Body]]:
    """Every object of a body with the path before its fields' names, itself first."""
    stack: list[tuple[str, Any]] = [("", body)]
    while stack:
        place, part = stack.pop()
        if isinstance(part, Body):
            yield place, part
            inner = [(f"{place}{name}.", getattr(part, name)) for name in type(part).model_fields]
        elif isinstance(part, list) and part and isinstance(part[0], Body):
            inner = [(f"{place}{number}.", each) for number, each in enumerate(part)]
        else:
            continue
        stack += reversed(inner)
