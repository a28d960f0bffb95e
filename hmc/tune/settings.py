"""What of a plan can be set: `threads=32`, `chunk=1024`, `ring=64`, and tile choices of kernels by
op, such as `linear.prefetch=4096`; hides how a plan takes a change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hmc.codegen.spec import TILES, KernelSpec, tile_fault
from hmc.errors import UsageError
from hmc.passes.place.memory import accounted
from hmc.plan import Decision, Plan
from hmc.plan.phases import PREFILL, STREAM
from hmc.tune.replan import replan

DECODE_OPS = ("linear", "gate_up", "experts_gate_up", "experts_down")
PREFILL_OPS = ("gemm", "grouped_gate_up", "grouped_down")
_MOST_THREADS = 4096

_FORM = re.compile(
    r"(?P<name>threads|chunk|ring|(?P<op>[a-z_]+)\.(?P<tile>[a-z_]+))=(?P<value>\d+)"
)


@dataclass(frozen=True)
class Setting:
    """One value: `op` is empty for threads, chunk and ring, else the op whose kernels' tile choice
    `name` it is.
    """

    name: str
    value: int
    op: str = ""

    def __str__(self) -> str:
        return f"{self.op}.{self.name}={self.value}" if self.op else f"{self.name}={self.value}"


def parse_setting(text: str) -> Setting:
    """`threads=32`, `chunk=1024`, `ring=64` or `OP.TILE=VALUE`; `UsageError` for others."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--set {text}: write threads=N, chunk=N, ring=N or OP.TILE=N ({_known()})"
        )
    value = int(match["value"])
    if match["op"] is None:
        least = 2 if match["name"] == "ring" else 1
        if value < least:
            raise UsageError(f"--set {text}: must be at least {least}")
        return Setting(match["name"], value)
    tiles = TILES.get(match["op"], {})
    if match["tile"] not in tiles:
        raise UsageError(f"--set {text}: no such tile choice; there are {_known()}")
    if value not in tiles[match["tile"]]:
        raise UsageError(f"--set {text}: not a value that {match['op']} can take")
    return Setting(match["tile"], value, match["op"])


def apply(plan: Plan, settings: tuple[Setting, ...], checkpoint: str = "") -> Plan:
    """The plan with all settings; `UsageError` where they do not fit it or each other. A ring needs
    the model's config.json (see `replan`)."""
    for setting in settings:
        if setting.op:
            plan = _tiled(plan, setting)
        elif setting.name == "threads":
            if setting.value > _MOST_THREADS:
                raise UsageError(f"--set {setting}: more than {_MOST_THREADS} threads")
            plan = _asked(plan, threads=setting.value).model_copy(update={"threads": setting.value})
        elif setting.name == "ring":
            plan = _with_ring(plan, setting.value, checkpoint)
        else:
            plan = _chunked(plan, setting.value)
    _check_tiles(plan)
    return plan


def current(plan: Plan, setting: Setting) -> int | None:
    """The plan's value of a setting; None for a kernel's own default."""
    if setting.op:
        values = {dict(kernel.tile).get(setting.name) for kernel in _of_op(plan, setting.op)}
        return values.pop() if len(values) == 1 else None
    if setting.name == "ring":
        return ring_of(plan)
    return plan.threads if setting.name == "threads" else plan.limits.max_chunk


def ring_of(plan: Plan) -> int | None:
    """Experts that fit into the slots of a streamed prompt; None for a plan that streams none."""
    return next((phase.ring for phase in plan.phases if phase.name == STREAM), None)


def decided(plan: Plan, subject: str, choice: str, reason: str) -> Plan:
    """The plan with one more decision by "tune"."""
    decision = Decision(by="tune", subject=subject, choice=choice, reason=reason)
    return plan.model_copy(update={"decisions": (*plan.decisions, decision)})


def ops_of(plan: Plan, ops: tuple[str, ...]) -> Iterator[str]:
    """Those of `ops` that a kernel of the plan has."""
    there = {kernel.op for kernel in plan.kernels.values()}
    return (op for op in ops if op in there)


def _tiled(plan: Plan, setting: Setting) -> Plan:
    if not _of_op(plan, setting.op):
        raise UsageError(f"--set {setting}: the plan has no kernel {setting.op}")
    changed = dict(plan.kernels)
    for key, kernel in plan.kernels.items():
        if kernel.op == setting.op:
            tile = dict(kernel.tile) | {setting.name: setting.value}
            changed[key] = replace(kernel, tile=tuple(sorted(tile.items())))
    return plan.model_copy(update={"kernels": changed})


def _of_op(plan: Plan, op: str) -> list[KernelSpec]:
    return [kernel for kernel in plan.kernels.values() if kernel.op == op]


def _asked(plan: Plan, **options: int) -> Plan:
    """The plan with other options, so that planning anew keeps them."""
    changed = plan.options.model_copy(update=options)
    return plan.model_copy(update={"options": changed})


def _chunked(plan: Plan, tokens: int) -> Plan:
    """Chunks of `tokens`: the limit, the phase, and what its activations take."""
    if tokens > plan.limits.max_context:
        raise UsageError(
            f"--set chunk={tokens}: the plan's context is {plan.limits.max_context} tokens"
        )
    phase = plan.phase(PREFILL).model_copy(update={"max_tokens": tokens})
    return accounted(
        _asked(plan, max_chunk=tokens).model_copy(
            update={
                "limits": plan.limits.model_copy(update={"max_chunk": tokens}),
                "phases": tuple(phase if each.name == PREFILL else each for each in plan.phases),
            }
        )
    )


def _with_ring(plan: Plan, ring: int, checkpoint: str) -> Plan:
    """Slots for `ring` experts, at most a layer's, in every phase that streams."""
    if ring_of(plan) is None:
        raise UsageError(f"--set ring={ring}: the plan streams no prompt through a GPU")
    found = replan(plan, plan.placement, checkpoint, ring=ring)
    if ring_of(found) is None:
        why = next(d.reason for d in found.decisions if d.subject == STREAM)
        raise UsageError(f"--set ring={ring}: {why}")
    return found


def _check_tiles(plan: Plan) -> None:
    for kernel in plan.kernels.values():
        if fault := tile_fault(kernel.op, dict(kernel.tile)):
            raise UsageError(f"--set {kernel.op}: {fault}")


def _known() -> str:
    return "; ".join(f"{op}: {', '.join(tiles)}" for op, tiles in TILES.items())
