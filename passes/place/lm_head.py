"""Whether decode steps read the output matrix as it is stored, or screen it by a compact copy
(hmc/ops/screen.py), so that only rows which may be among the best are computed from it.

Contract
    * tokens are the same to the bit; where a request needs all logits the whole matrix is read
    * only in phases of the CPU alone, where the matrix makes the logits itself: arithmetic behind
      it may round unlike logits to equal ones, and GPUs read it faster than they would choose
    * time against memory: the copy comes beside the matrix. Without being asked it is made where
      the machine has the memory, and a step takes less time by the machine's rates, or without
      rates reads less
    * what was asked for and cannot be is refused
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hmc.errors import UsageError
from hmc.ops import OPS, Stored, Use
from hmc.ops.screen import GROUP, compact_bytes, gain_bytes, unscreened
from hmc.passes.place.budget import host_free
from hmc.passes.records import Base, Notes
from hmc.plan import Phase, Plan, Step
from hmc.plan.memory import kind_of
from hmc.plan.operands import LOGITS
from hmc.plan.stored import stored_form
from hmc.predict.cost import Call, CostModel

_SUBJECT = "LM head"


@dataclass(frozen=True)
class LmHead:
    """Screens the steps of decode that make logits."""

    name: ClassVar[str] = "lm_head"
    lm_head: str = "auto"

    def run(self, plan: Plan, base: Base) -> Plan:
        notes = Notes(self.name)
        if self.lm_head == "stored":
            notes.decide(_SUBJECT, "stored", "asked for")
            return notes.on(plan)
        if lacks := _lacks(plan):
            if self.lm_head == "screened":
                raise UsageError(f"--lm-head screened: {lacks}; leave it out")
            notes.decide(_SUBJECT, "stored", lacks)
            return notes.on(plan)
        screened = _screened(plan)
        before, after = (_seconds(each) for each in (plan, screened))
        head = _head(plan.phase("decode"))
        assert head is not None
        rows, k = int(head.attrs["n"]), int(head.attrs["k"])
        copy, free = compact_bytes(rows, k), _free(plan, base)
        times = f", {after * 1e3:.2f} ms instead of {before * 1e3:.2f}" if before else ""
        about = f"a step reads {copy / 1e6:.1f} MB instead of {head.weight_bytes / 1e6:.1f}{times}"
        if self.lm_head == "auto":
            if not gain_bytes(rows, k, head.weight_bytes) or after > before:
                notes.decide(_SUBJECT, "stored", f"screened {about}: that does not pay")
                return notes.on(plan)
            if copy > free:
                why = f"a compact copy takes {copy / 1e6:.1f} MB, {max(0, free) / 1e6:.1f} are free"
                notes.decide(_SUBJECT, "stored", why)
                return notes.on(plan)
        notes.decide(_SUBJECT, "screened", about + "; --lm-head stored has no copy")
        return notes.on(screened, phases=screened.phases, kernels=screened.kernels)


def screen_bytes(plan: Plan) -> int:
    """Bytes of the compact copies of a plan."""
    copies = {
        step.weights["weight"]: compact_bytes(int(step.attrs["n"]), int(step.attrs["k"]))
        for phase in plan.phases
        for step in phase.steps
        if "screen" in step.attrs
    }
    return sum(copies.values())


def _phases(plan: Plan) -> list[Phase]:
    """Those of decode that the CPU alone computes."""
    return [
        phase
        for phase in plan.phases
        if kind_of(phase) == "decode" and all(step.resource == "cpu" for step in phase.steps)
    ]


def _head(phase: Phase) -> Step | None:
    """The step whose matrix makes the logits."""
    for step in phase.steps:
        row = OPS[step.op]
        if "screen" in row.extra and any(o.buffer == LOGITS for o in step.outputs.values()):
            return step
    return None


def _lacks(plan: Plan) -> str:
    """Why no output matrix can be screened; "" where it can."""
    phases = _phases(plan)
    if not phases:
        return "GPUs decode"
    step = _head(phases[0])
    if step is None:
        return "arithmetic follows the output matrix"
    if set(step.weights) != {"weight"}:
        return "the output matrix has a bias"
    stored = next(each for each in plan.weights if each.name == step.weights["weight"])
    return unscreened(stored.format, int(step.attrs["k"]))


def _screened(plan: Plan) -> Plan:
    """The plan with its heads screened."""
    kernels, chosen = dict(plan.kernels), {phase.name for phase in _phases(plan)}
    forms = {weight.name: weight for weight in plan.weights}

    def phase(old: Phase) -> Phase:
        head = _head(old) if old.name in chosen else None
        if head is None:
            return old
        row, attrs = OPS[head.op], {**head.attrs, "screen": GROUP}
        tokens = next(plan.kernels[key] for key in head.kernels)["tokens"]
        stored: dict[str, Stored] = {"weight": stored_form(forms[head.weights["weight"]])}
        specs = row.kernels(attrs, stored, Use(plan.isa, tokens, plan.kv.block))
        kernels.update((row.key(spec), spec) for spec in specs if row.key(spec) not in kernels)
        changes = {
            "attrs": attrs,
            "kernels": tuple(map(row.key, specs)),
            "weight_bytes": compact_bytes(int(attrs["n"]), int(attrs["k"])),
        }
        steps = (step.model_copy(update=changes) if step is head else step for step in old.steps)
        return old.model_copy(update={"steps": tuple(steps)})

    phases = tuple(map(phase, plan.phases))
    return plan.model_copy(update={"phases": phases, "kernels": dict(sorted(kernels.items()))})


def _seconds(plan: Plan) -> float:
    """What the head takes of a decode step of one token by the machine's rates; 0 without."""
    if plan.machine.rates is None:
        return 0.0
    phase = _phases(plan)[0]
    head = _head(phase)
    assert head is not None
    return CostModel(plan).step(phase, head, Call(1)).seconds


def _free(plan: Plan, base: Base) -> int:
    """Bytes of the host's memory that weights, cache and the reserve leave."""
    kv = plan.kv
    cache = kv.capacity_tokens * kv.bytes_per_token + kv.bytes_of_sequences
    return host_free(base.needs, plan.machine) - cache
