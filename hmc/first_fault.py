"""Validation that ends at the first fault of a list. pydantic makes an error object for every
element that is wrong: a megabyte of them took a second and a gigabyte.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import core_schema

_FORMS: dict[str, Any] = {
    "list": core_schema.ListSchema,
    "tuple": core_schema.TupleSchema,
    "set": core_schema.SetSchema,
    "dict": core_schema.DictSchema,
}
_KINDS = {kind for kind, form in _FORMS.items() if "fail_fast" in form.__annotations__}
"""What can; older releases of pydantic know it of lists alone."""


def _end_early(part: Any) -> None:
    """Mark what a schema holds."""
    if isinstance(part, dict):
        kind = part.get("type")  # of a model's fields, where one is called so, its schema
        if isinstance(kind, str) and kind in _KINDS:
            part["fail_fast"] = True
        part = list(part.values())
    if isinstance(part, list | tuple):
        for each in part:
            _end_early(each)


class FirstFault(BaseModel):
    """A model whose lists, tuples and dictionaries are refused at their first fault."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        schema = handler(source)
        _end_early(schema)
        return schema
