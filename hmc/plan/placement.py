"""Checks what of a plan no single step shows: where experts live and are computed, what layers
cache, slots and resources, phases, limits and switch-over points.

placement   every expert of every layer is in exactly one tier; in every phase each is computed
            once, by the device that has it or from a slot
cache       the states of the attention ops are the cache's, each layer's once; it holds a context
resources   GPUs are the machine's; slots hold what loads bring
phases      names, sizes of calls, and switch-over points agree with each other and the limits
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from math import isfinite

from hmc import env
from hmc.codegen.spec import MAX_TOKENS
from hmc.errors import VerifyError
from hmc.ops import State
from hmc.plan.about import About
from hmc.plan.memory import device_of, expert_bytes, packed_bytes, resident_names, restores
from hmc.plan.model import Phase, Plan, Step
from hmc.plan.phases import DECODE, PREFILL
from hmc.plan.states import state_groups
from hmc.ranges import expert_intervals

_Intervals = tuple[tuple[int, int], ...]
_MOST_TOKENS = 1 << 31


class Placement:
    """Where a plan's experts are, known to be one tier each."""

    def __init__(self, plan: Plan) -> None:
        """`VerifyError` where an expert is in no tier or in two, or a tier is no device."""
        self._plan = plan
        self._counts = {experts.layer: experts.count for experts in plan.experts}
        self._known = {weight.name: weight for weight in plan.weights}
        self._expert_bytes = expert_bytes(plan)
        placed = [placement.layer for placement in plan.placement]
        if sorted(placed) != sorted(self._counts):
            raise VerifyError("placement: its layers are not the layers with routed experts")
        self._tiers: dict[tuple[int, str], _Intervals] = {}
        for placement in plan.placement:
            layer = placement.layer
            for tier, text in placement.tiers.items():
                if tier != "host":
                    _check_resource(plan, tier, ("gpu",), f"placement of layer {layer}")
                self._tiers[layer, tier] = _parsed(text)
            every = [part for text in placement.tiers.values() for part in _parsed(text)]
            if _joined(every) != _all(self._counts[layer]):
                raise VerifyError(
                    f"placement of layer {layer}: not every expert is in exactly one tier"
                )

    def begin(self, phase: Phase) -> None:
        """A phase begins; `VerifyError` where two of its slots share a name."""
        self._phase = phase
        self._computed: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._resident: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
        self._attended: Counter[tuple[int, tuple[str, ...]]] = Counter()
        self._kept: list[tuple[int, tuple[State, ...]]] = []
        self._slots = {(slot.name, slot.device): slot.bytes for slot in phase.slots}
        if len({slot.name for slot in phase.slots}) != len(phase.slots):
            raise VerifyError(f"phase {phase.name}: two slots share a name")

    def step(self, step: Step, about: About) -> None:
        """Where a step runs, and which experts, states and slots it has."""
        row = about.row
        _check_home(step, about)
        if row.routed or (row.loads and "range" in step.attrs):
            some = self._some(step)
            if row.routed:
                self._computed.setdefault((step.layer, step.lane), []).extend(some)
                if not step.uses:
                    tier = "host" if step.resource == "cpu" else step.resource
                    self._resident.setdefault((step.layer, step.lane, tier), []).extend(some)
        elif row.attends:
            rows = self._phase.lanes if "whole" in step.attrs else 1
            states = row.states(step.attrs)
            self._attended[step.layer, tuple(state.name for state in states)] += rows
            self._kept.append((step.layer, states))
        if step.fills or step.uses or row.loads:
            self._check_slots(step, about)

    def finish(self) -> None:
        """Raise `VerifyError` on the first rule that a phase's steps break together."""
        phase = self._phase
        resources = {step.resource for step in phase.steps}
        for resource in resources - {"cpu"}:
            kinds = ("gpu", "h2d", "d2h") if phase.ranks == 1 else ("gpu", "h2d", "d2h", "link")
            _check_resource(self._plan, resource, kinds, f"phase {phase.name}")
        for (layer, _), parts in self._computed.items():
            if _joined(parts) != _all(self._counts[layer]):
                raise VerifyError(
                    f"phase {phase.name}: not every expert of layer {layer} is computed once"
                )
        for (layer, _, tier), parts in self._resident.items():
            if _joined(parts) != _joined(self._tiers.get((layer, tier), ())):
                raise VerifyError(
                    f"phase {phase.name}: {tier} computes other experts of layer {layer} than are"
                    " placed there"
                )
        if state_groups(self._kept) != self._plan.kv.groups or (
            set(self._attended.values()) - {phase.ranks * phase.lanes}
        ):
            raise VerifyError(
                f"phase {phase.name}: its steps keep other states than the cache's layout says"
            )

    def _some(self, step: Step) -> _Intervals:
        """The experts a step has: all of its layer, or those of its range, which it counts."""
        whole = tuple(_all(self._counts.get(step.layer, 0)))
        if "range" not in step.attrs and "count" not in step.attrs:
            return whole
        some = _parsed(str(step.attrs.get("range", "")))
        count = sum(last - first + 1 for first, last in some)
        if count != step.attrs.get("count") or not count or some[-1][1] > whole[-1][1]:
            raise VerifyError(f"its range and count are not of experts of layer {step.layer}")
        return some

    def _check_slots(self, step: Step, about: About) -> None:
        """Loads fill slots of their device, large enough; others use those of theirs."""
        device = device_of(step.resource)
        if bool(step.fills) != about.row.loads or (step.uses and not step.resource == device):
            raise VerifyError("loads on the way to a GPU fill slots, steps there use them")
        for name in (*step.fills, *step.uses):
            if (name, device) not in self._slots:
                raise VerifyError(f"slot {name} is not declared on {device}")
        if not step.fills:
            return
        if restores(step):
            names = resident_names(self._plan.phases, device)
            size = packed_bytes(self._known[name] for name in names)
        elif "range" in step.attrs:
            size = self._expert_bytes[step.layer] * int(step.attrs["count"])
        else:
            size = packed_bytes(self._known[name] for name in step.weights.values())
        if len(step.fills) != 1 or size > self._slots[step.fills[0], device]:
            raise VerifyError("its slots are too small")


def check_constants(plan: Plan, step: Step, about: About) -> None:
    """Raise `VerifyError` where a rotary constant is not half as long as the columns it turns."""
    if "rope" not in about.row.attrs or about.row.attrs["rope"] is not str:
        return
    found = plan.constants.get(str(step.attrs["rope"]))
    if found is None or 2 * len(found) != step.attrs["dim"] or not all(map(isfinite, found)):
        raise VerifyError(
            f"rotary constant {step.attrs['rope']} is not in the plan with {step.attrs['dim']} / 2"
            " numbers"
        )


def check_limits(plan: Plan) -> None:
    """Raise `VerifyError` where limits, cache, phases and switch-over points contradict each
    other."""
    limits, kv = plan.limits, plan.kv
    whole = -(-limits.max_context // kv.block) * kv.block if kv.block > 0 else 0
    if not (
        0 < whole <= kv.capacity_tokens < _MOST_TOKENS
        and kv.capacity_tokens % kv.block == 0
        and 0 < limits.max_chunk <= limits.max_context
        and 0 < limits.max_batch <= min(kv.capacity_tokens // kv.block, kv.sequences)
        and kv.slots < _MOST_TOKENS
        and all(kv.rows(layer, state) < _MOST_TOKENS for layer, state in kv.each())
    ):
        raise VerifyError(
            f"limits: a cache of {kv.capacity_tokens} tokens in blocks of {kv.block} is none for"
            f" contexts of {limits.max_context}, chunks of {limits.max_chunk} and"
            f" {limits.max_batch} sequences"
        )
    if not 0 < plan.threads <= env.MOST_THREADS:
        raise VerifyError(f"{plan.threads} threads: there must be 1..{env.MOST_THREADS}")
    cpu = all(step.resource == "cpu" for phase in plan.phases for step in phase.steps)
    if kv.room not in (0, limits.max_chunk) or (kv.room and not cpu):
        raise VerifyError(
            f"the KV cache has rings for calls of {kv.room} tokens: those of chunks are of"
            f" {limits.max_chunk}, and where GPUs compute there are none"
        )
    if len(set(kv.layers)) != len(kv.layers):
        raise VerifyError("the KV cache has a layer twice")
    names = [phase.name for phase in plan.phases]
    if len(set(names)) != len(names) or not {DECODE, PREFILL} <= set(names):
        raise VerifyError(f"phases: {DECODE} and {PREFILL} must be there, and no name twice")
    most = {DECODE: min(limits.max_batch, MAX_TOKENS), PREFILL: limits.max_chunk}
    for phase in plan.phases:
        kind = phase.name.partition(".")[0]
        if kind not in ("decode", "prefill"):
            raise VerifyError(f"phase {phase.name} is neither of decode nor of prefill")
        bound = most.get(phase.name, most[DECODE] if kind == DECODE else limits.max_context)
        exact = phase.name in most
        if not 0 < phase.max_tokens <= bound or (exact and phase.max_tokens != bound):
            raise VerifyError(
                f"phase {phase.name} takes {bound} tokens a call by the plan's limits, not"
                f" {phase.max_tokens}"
            )
        if phase.activation_bytes < 0 or not 1 <= phase.ranks <= max(1, len(plan.machine.gpus)):
            raise VerifyError(f"phase {phase.name}: {phase.ranks} ranks are not there")
        if phase.lanes < 1:
            raise VerifyError(f"phase {phase.name} has no lanes")
    for switch in plan.switches:
        if switch.phase not in names or switch.phase.partition(".")[0] != switch.kind:
            raise VerifyError(
                f"the switch-over point at {switch.tokens} names {switch.phase}, no phase of"
                f" {switch.kind}"
            )


def _check_home(step: Step, about: About) -> None:
    """A step runs where its op may."""
    where, resource = about.row.where, step.resource
    kinds = {"host", "cpu"} if resource == "cpu" else {resource.rstrip("0123456789")}
    allowed = ("host", "gpu") if where == "any" else where.split()
    if kinds.isdisjoint(allowed):
        raise VerifyError(f"it cannot run on {resource}")


def _check_resource(plan: Plan, name: str, kinds: tuple[str, ...], where: str) -> None:
    kind = name.rstrip("0123456789")
    number = name.removeprefix(kind)
    right = not number if kind == "link" else number and int(number) < len(plan.machine.gpus)
    if kind not in kinds or not right or (number and str(int(number)) != number):
        raise VerifyError(f"{where}: the machine has no {name}")


@lru_cache(1 << 12)
def _parsed(text: str) -> _Intervals:
    return tuple(expert_intervals(text))


def _all(count: int) -> list[tuple[int, int]]:
    return [(0, count - 1)]


def _joined(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts in order, those that follow each other as one; none are left out."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(parts):
        if result and result[-1][1] + 1 == first:
            result[-1] = result[-1][0], last
        else:
            result.append((first, last))
    return result
