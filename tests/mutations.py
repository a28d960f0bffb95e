"""One field of one record of a plan changed to another valid value of its type."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from hmc.codegen.spec import KernelSpec
from hmc.ops import State
from hmc.plan import Plan

Path = tuple[str | int, ...]
Record = BaseModel | State | KernelSpec


@dataclass(frozen=True)
class Mutation:
    """`plan` with the field at `path` changed from `old` to `new`."""

    plan: Plan
    path: Path
    old: Any
    new: Any


class Mutator:
    """Mutations of one plan, by a seed each.

    Half of them hit every type of record alike, half every record.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._records: list[tuple[Path, Record]] = []
        self._collect((), plan)
        self._by_type: dict[type, list[tuple[Path, Record]]] = defaultdict(list)
        for path, record in self._records:
            self._by_type[type(record)].append((path, record))
        self._adapters: dict[tuple[type, str], TypeAdapter[Any]] = {}

    def mutation(self, seed: int) -> Mutation:
        """The mutation of a seed."""
        random = Random(seed)
        while True:
            kinds = list(self._by_type.values())
            records = random.choice(kinds) if random.random() < 0.5 else self._records
            path, record = random.choice(records)
            name = random.choice(list(_names(type(record))))
            old = getattr(record, name)
            if isinstance(old, Record) or _records_in(old):
                new = _without_or_twice(random, old)
            else:
                new = self._changed(random, record, name, old)
            if new is None or (new == old and type(new) is type(old)):
                continue
            try:
                new = self._adapter(type(record), name).validate_python(new)
            except ValidationError:
                continue
            if new != old:
                changed = _with(record, name, new)
                return Mutation(_put(self._plan, path, changed), (*path, name), old, new)

    def _collect(self, path: Path, value: Any) -> None:
        if isinstance(value, Record):
            self._records.append((path, value))
            for name in _names(type(value)):
                self._collect((*path, name), getattr(value, name))
        elif isinstance(value, tuple):
            for number, each in enumerate(value):
                self._collect((*path, number), each)
        elif isinstance(value, dict):
            for key, each in value.items():
                self._collect((*path, key), each)

    def _adapter(self, kind: type[Record], name: str) -> TypeAdapter[Any]:
        if (kind, name) not in self._adapters:
            metadata = kind.model_fields[name].metadata if issubclass(kind, BaseModel) else ()
            whole = Annotated[(_names(kind)[name], *metadata, None)]
            self._adapters[kind, name] = TypeAdapter(whole)
        return self._adapters[kind, name]

    def _changed(self, random: Random, record: Record, name: str, old: Any) -> Any:
        """Another value like it, often one that another record has in this field."""
        annotation = _names(type(record))[name]
        if get_origin(annotation) is not None and isinstance(old, str):
            return random.choice(get_args(annotation))
        if random.random() < 0.4:
            other = random.choice(self._by_type[type(record)])[1]
            return getattr(other, name)
        return _other(random, old)


def _names(kind: type[Record]) -> dict[str, Any]:
    """The fields of a record with their types."""
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    types = get_type_hints(kind)
    return {field.name: types[field.name] for field in fields(kind)}


def _with(record: Record, name: str, new: Any) -> Record:
    if isinstance(record, BaseModel):
        return record.model_copy(update={name: new})
    return replace(record, **{name: new})


def _records_in(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value
    return isinstance(value, tuple | dict) and any(isinstance(each, Record) for each in inside)


def _without_or_twice(random: Random, value: Any) -> Any:
    """A table of records with one left out, one twice, or two in each other's place."""
    if isinstance(value, tuple):
        return _shuffled(random, value)
    if isinstance(value, dict):
        return _rekeyed(random, value)
    return None


def _shuffled(random: Random, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        return values
    at, to = random.randrange(len(values)), random.randrange(len(values))
    result = list(values)
    match random.randrange(3):
        case 0:
            del result[at]
        case 1:
            result.insert(to, result[at])
        case _:
            result[at], result[to] = result[to], result[at]
    return tuple(result)


def _rekeyed(random: Random, values: dict[str, Any]) -> dict[str, Any]:
    if not values:
        return {"x": 0}
    key = random.choice(list(values))
    result = dict(values)
    match random.randrange(4):
        case 0:
            del result[key]
        case 1:
            result[key + "x"] = result.pop(key)
        case 2:
            result[key + "0"] = result[key]
        case _:
            result[key] = random.choice(list(values.values()))
    return result


def _other(random: Random, value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return random.choice((value + 1, value - 1, 2 * value, 0, -1, 1, 1 << 30, value + 64))
        case float():
            return random.choice((2 * value, 0.0, -value, value + 1.0))
        case str():
            return random.choice((value + "0", value[:-1], "", "x", value.replace("0", "1")))
        case tuple() if value and random.random() < 0.6:
            at = random.randrange(len(value))
            return (*value[:at], _other(random, value[at]), *value[at + 1 :])
        case tuple():
            return _shuffled(random, value) or (0,)
        case dict() if value and random.random() < 0.6:
            key = random.choice(list(value))
            return {**value, key: _other(random, value[key])}
        case dict():
            return _rekeyed(random, value)
    return None


def _put(value: Any, path: Path, new: Any) -> Any:
    """`value` with what is at `path` replaced."""
    if not path:
        return new
    first, *rest = path
    if isinstance(value, Record):
        inside = _put(getattr(value, str(first)), tuple(rest), new)
        return _with(value, str(first), inside)
    if isinstance(value, dict):
        return {**value, first: _put(value[str(first)], tuple(rest), new)}
    at = int(first)
    return (*value[:at], _put(value[at], tuple(rest), new), *value[at + 1 :])
