"""What two plans differ in, by kind of thing: facts, placement, ledger, kernels, phases, weights,
decisions. Hides how steps of two schedules are matched.

Every field of a plan belongs to one of these kinds, so two plans differ if and only if their
`PlanDiff` holds something. Steps are matched by what they do (op, layer, lane, weights), not by
their number, so that one inserted step is one added step, and a step on another resource a changed
one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any, TypeVar

from pydantic_core import to_jsonable_python

from hmc.plan.changes import (
    ABSENT,
    Change,
    DecisionChange,
    LedgerChange,
    Moved,
    NamedChange,
    PhaseChange,
    PlanDiff,
    Status,
)
from hmc.plan.memory import stored_expert_bytes
from hmc.plan.model import ExpertWeights, Phase, Plan, Step, Weight
from hmc.ranges import expert_ranges, ranges

SECTIONS = ("placement", "ledger", "kernels", "phases", "weights", "experts", "decisions")
"""Fields of `Plan` that are compared in a way of their own; all others value by value."""

_NUMBERING = {"id", "waits", "signal"}
_TABLES = {"name", "steps", "buffers", "slots"}
_LONGEST = 60

Key = tuple[Hashable, ...]
Name = TypeVar("Name")
Found = TypeVar("Found")


def diff(a: Plan, b: Plan) -> PlanDiff:
    """What `b` has that `a` has not, and the other way round."""
    found = PlanDiff(
        facts=tuple(_facts(a, b)),
        placement=tuple(_placement(a, b)),
        ledger=tuple(_ledger(a, b)),
        kernels=tuple(_named(a.kernels, b.kernels)),
        phases=tuple(_phases(a, b)),
        weights=tuple(_named(_weights(a), _weights(b))),
        decisions=tuple(_decisions(a, b)),
    )
    # A section that differs in nothing above differs in the order of its entries.
    order = [
        Change(f"{section}: order or numbering", "one", "another")
        for section in SECTIONS
        if getattr(a, section) != getattr(b, section)
        and not getattr(found, "weights" if section == "experts" else section)
    ]
    return replace(found, facts=(*found.facts, *order))


# -- facts -----------------------------------------------------------------------------------------


def _facts(a: Plan, b: Plan) -> Iterator[Change]:
    for field in (name for name in Plan.model_fields if name not in SECTIONS):
        before, after = getattr(a, field), getattr(b, field)
        if before != after:
            yield from _changes(dict(_flat(field, before)), dict(_flat(field, after)))


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """By path; a long list tells where it first differs."""
    for path, one, two in _differing(before, after):
        texts = _text(one), _text(two)
        if isinstance(one, list) and isinstance(two, list) and max(map(len, texts)) > _LONGEST:
            pairs = enumerate(zip_longest(one, two, fillvalue=ABSENT))
            at, texts = next((at, (_text(x), _text(y))) for at, (x, y) in pairs if x != y)
            path += f"[{at}]"
        yield Change(path, *texts)


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of a model by dotted path; lists of plain values are leaves."""
    value = to_jsonable_python(value)
    if isinstance(value, dict):
        if value.keys() >= {"value", "kind", "source"}:  # a machine's rate reads best as a whole
            extras = {**value, "value": f"{value['value']:g}"}.values()
            yield path, ", ".join(_text(each) for each in extras if each)
            return
        for key, each in value.items():
            yield from _flat(f"{path}.{key}", each)
    elif isinstance(value, list):
        if any(isinstance(each, dict) for each in value):
            for number, each in enumerate(value):
                yield from _flat(f"{path}[{number}]", each)
        elif len(value) > 2 and all(type(each) is int for each in value) and value == sorted(value):
            yield path, ranges(value)
        else:
            yield path, value
    else:
        yield path, value


def _text(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, list):
        return ", ".join(_text(each) for each in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- placement and ledger --------------------------------------------------------------------------


def _placement(a: Plan, b: Plan) -> Iterator[Moved]:
    """Moves of consecutive layers with the same moves are one entry."""
    before, after = ({each.layer: each.homes for each in plan.placement} for plan in (a, b))
    sizes = stored_expert_bytes(a) | stored_expert_bytes(b)
    runs: list[tuple[tuple[str, str, str], list[int]]] = []
    previous: dict[tuple[str, str, str], list[int]] = {}
    for layer in sorted(before.keys() | after.keys()):
        moves = _moves(before.get(layer, {}), after.get(layer, {}))
        runs += ((move, []) for move in moves if move not in previous)
        previous = {move: layers for move, layers in runs if move in moves}
        for layers in previous.values():
            layers.append(layer)
    runs.sort(key=lambda run: (run[1][0], run[1][-1]))
    for (source, target, experts), layers in runs:
        count = len(expert_ranges(experts))
        size = sum(count * sizes.get(layer, 0) for layer in layers)
        yield Moved(ranges(layers), source, target, experts, count * len(layers), size)


def _moves(before: Mapping[int, str], after: Mapping[int, str]) -> list[tuple[str, str, str]]:
    """(from, to, experts) of one layer."""
    moved: dict[tuple[str, str], list[int]] = defaultdict(list)
    for expert in sorted(before.keys() | after.keys()):
        pair = before.get(expert, ABSENT), after.get(expert, ABSENT)
        if pair[0] != pair[1]:
            moved[pair].append(expert)
    return [(*pair, ranges(experts)) for pair, experts in moved.items()]


def _ledger(a: Plan, b: Plan) -> Iterator[LedgerChange]:
    before, after = _by_device(a), _by_device(b)
    for device, *sides in _differing(before, after):
        one, two = (side or {} for side in sides)
        for kind, old, new in _differing(one, two):
            yield LedgerChange(device, kind, *_sides(old, new))
        totals = [sum(size for size, _ in side.values()) for side in (one, two)]
        if totals[0] != totals[1]:
            yield LedgerChange(device, "total", totals[0], totals[1])


def _by_device(plan: Plan) -> dict[str, dict[str, tuple[int, str]]]:
    """Device -> kind -> (bytes, details)."""
    found: dict[str, dict[str, tuple[int, str]]] = defaultdict(dict)
    for item in sorted(plan.ledger, key=lambda each: (each.detail, each.bytes)):
        size, detail = found[item.device].get(item.kind, (0, ""))
        joined = f"{detail}; {item.detail}" if detail else item.detail
        found[item.device][item.kind] = (size + item.bytes, joined)
    return found


def _sides(one: tuple[int, str] | None, two: tuple[int, str] | None) -> tuple[int, int, str]:
    before, after = one or (0, ""), two or (0, "")
    both = one is not None and two is not None and before[1] != after[1]
    return before[0], after[0], f"{before[1]} -> {after[1]}" if both else after[1] or before[1]


# -- kernels and weights ---------------------------------------------------------------------------


def _named(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[NamedChange]:
    for name, one, two in _differing(before, after):
        both = one is not None and two is not None
        found = _changes(dict(_flat("", one)), dict(_flat("", two))) if both else ()
        texts = [f"{each.what[1:]} {each.before} -> {each.after}" for each in found]
        yield NamedChange(name, _status(one, two), "; ".join(texts))


def _weights(plan: Plan) -> dict[str, Weight | ExpertWeights]:
    found: dict[str, Weight | ExpertWeights] = {each.name: each for each in plan.weights}
    return found | {each.pattern: each for each in plan.experts}


# -- phases ----------------------------------------------------------------------------------------


def _phases(a: Plan, b: Plan) -> Iterator[PhaseChange]:
    before = {phase.name: phase for phase in a.phases}
    after = {phase.name: phase for phase in b.phases}
    for name, one, two in _differing(before, after):
        facts = tuple(_phase_facts(one, two)) if one is not None and two is not None else ()
        steps = _keyed(one), _keyed(two)
        contents = _contents(one, steps[0]), _contents(two, steps[1])
        added = Counter(steps[1][key].op for key in steps[1] if key not in steps[0])
        removed = Counter(steps[0][key].op for key in steps[0] if key not in steps[1])
        changed: Counter[str] = Counter()
        fields: Counter[str] = Counter()
        for key in contents[0].keys() & contents[1].keys():
            old, new = contents[0][key], contents[1][key]
            if old != new:
                changed[steps[0][key].op] += 1
                fields.update(field for field in old if old[field] != new[field])
        yield PhaseChange(
            name,
            _status(one, two),
            len(steps[0]),
            len(steps[1]),
            dict(added.most_common()),
            dict(removed.most_common()),
            dict(sorted(changed.items())),
            dict(sorted(fields.items())),
            facts,
        )


def _phase_facts(one: Phase, two: Phase) -> Iterator[Change]:
    plain = [
        dict(_flat("", {f: getattr(phase, f) for f in Phase.model_fields if f not in _TABLES}))
        for phase in (one, two)
    ]
    for change in _changes(*plain):
        yield Change(change.what[1:], change.before, change.after)
    for table in ("buffers", "slots"):
        rows = [{each.name: each for each in getattr(phase, table)} for phase in (one, two)]
        found = Counter(change.status for change in _named(rows[0], rows[1]))
        if found:
            text = ", ".join(f"{count} {status}" for status, count in sorted(found.items()))
            yield Change(table, str(len(rows[0])), f"{len(rows[1])} ({text})")
    orders = [list(_keyed(phase)) for phase in (one, two)]
    both = set(orders[0]) & set(orders[1])
    if [key for key in orders[0] if key in both] != [key for key in orders[1] if key in both]:
        yield Change("order of the steps", "one", "another")


def _keyed(phase: Phase | None) -> dict[Key, Step]:
    """Steps by what they do and how often that was done before."""
    seen: Counter[Key] = Counter()
    found: dict[Key, Step] = {}
    for step in phase.steps if phase else ():
        key: Key = (
            step.op,
            step.layer,
            step.lane,
            tuple(sorted(step.weights.items())),
            step.attrs.get("range"),
        )
        found[*key, seen[key]] = step
        seen[key] += 1
    return found


def _contents(phase: Phase | None, steps: Mapping[Key, Step]) -> dict[Key, dict[str, Any]]:
    """Fields of each step; events by the steps that signal them, numbers left out."""
    signalled = {step.signal: key for key, step in steps.items() if step.signal >= 0}
    names = [field for field in Step.model_fields if field not in _NUMBERING]
    return {
        key: {name: getattr(step, name) for name in names}
        | {"waits": sorted(map(repr, (signalled.get(event) for event in step.waits)))}
        for key, step in steps.items()
    }


# -- decisions -------------------------------------------------------------------------------------


def _decisions(a: Plan, b: Plan) -> Iterator[DecisionChange]:
    before, after = _numbered(a), _numbered(b)
    for key, one, two in _differing(before, after):
        choices = [ABSENT if each is None else each[0] for each in (one, two)]
        latest = two or one
        assert latest is not None
        yield DecisionChange(key[0], key[1], _status(one, two), choices[0], choices[1], latest[1])


def _numbered(plan: Plan) -> dict[tuple[str, str, int], tuple[str, str]]:
    """(choice, reason) by pass, subject and how many there were of the same before."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for each in plan.decisions:
        key = (each.by, each.subject)
        found[*key, seen[key]] = (each.choice, each.reason)
        seen[key] += 1
    return found


def _differing(
    before: Mapping[Name, Found], after: Mapping[Name, Found]
) -> Iterator[tuple[Name, Found | None, Found | None]]:
    """The keys with other values before than after, and these; those of the first come first."""
    for name in dict.fromkeys((*before, *after)):
        one, two = before.get(name), after.get(name)
        if one != two:
            yield name, one, two


def _status(one: object, two: object) -> Status:
    return "added" if one is None else "removed" if two is None else "changed"
