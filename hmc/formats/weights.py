"""The planes of a weight of a plan: the bytes each must have, and what they are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from hmc.errors import UnsupportedError
from hmc.formats.base import Form, forms
from hmc.formats.table import format_of


class NamedPlane(Protocol):
    """A plane of a stored weight."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...


class StoredWeight(Protocol):
    """A weight, or one of a column of experts."""

    @property
    def format(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def group(self) -> int: ...

    @property
    def planes(self) -> Sequence[NamedPlane]: ...


def forms_of(weight: StoredWeight) -> tuple[Form, ...]:
    """The planes of a weight, in the order of its format's row; `UnsupportedError` where they are
    not those of its format, shape and group.
    """
    row = format_of(weight.format)
    names = [plane.name for plane in weight.planes]
    if names != [plane.name for plane in row.planes]:
        raise UnsupportedError(f"planes {', '.join(names)} are not those of {row.name}")
    dtypes = tuple(plane.dtype for plane in weight.planes)
    return _forms(row.name, weight.shape, weight.group, dtypes)


@lru_cache(1 << 10)
def _forms(
    name: str, shape: tuple[int, ...], group: int, dtypes: tuple[str, ...]
) -> tuple[Form, ...]:
    """Weights of all layers are alike."""
    return forms(format_of(name), shape, group, dtypes)


def expected_planes(weight: StoredWeight) -> dict[str, int]:
    """Stored bytes that each plane of a weight must have; errors as `forms_of`."""
    return {form.plane.name: form.stored_bytes for form in forms_of(weight)}
