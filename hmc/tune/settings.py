"""What of a plan can be set: `threads=32`, `chunk=1024`, and tile choices of kernels by op, such as
`linear.prefetch=4096`; hides how a plan takes a change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hmc.errors import UsageError
from hmc.passes.phase_memory import accounted
from hmc.plan import Decision, Kernel, Plan

PREFILL = "prefill.host"
DECODE_OPS = ("linear", "gate_up", "experts_gate_up", "experts_down")
PREFILL_OPS = ("gemm", "grouped_gate_up", "grouped_down")
_BATCH = 16
"""rows x streams of a decode kernel must divide it (codegen/tiles.py: GRAIN)."""
_MOST_THREADS, _MOST_BYTES, _MOST_TILE = 4096, 1 << 24, 12

_FORM = re.compile(r"(?P<name>threads|chunk|(?P<op>[a-z_]+)\.(?P<tile>[a-z_]+))=(?P<value>\d+)")


@dataclass(frozen=True)
class Setting:
    """One value: `op` is empty for threads and chunk, else the op whose kernels' tile choice `name`
    it is.
    """

    name: str
    value: int
    op: str = ""

    def __str__(self) -> str:
        return f"{self.op}.{self.name}={self.value}" if self.op else f"{self.name}={self.value}"


def parse_setting(text: str) -> Setting:
    """`threads=32`, `chunk=1024` or `OP.TILE=VALUE`; `UsageError` for what cannot be set."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(f"--set {text}: write threads=N, chunk=N or OP.TILE=N ({_known()})")
    value = int(match["value"])
    if match["op"] is None:
        if value < 1:
            raise UsageError(f"--set {text}: must be at least 1")
        return Setting(match["name"], value)
    tiles = _TILES.get(match["op"], {})
    if match["tile"] not in tiles:
        raise UsageError(f"--set {text}: no such tile choice; there are {_known()}")
    if not tiles[match["tile"]](value):
        raise UsageError(f"--set {text}: not a value that {match['op']} can take")
    return Setting(match["tile"], value, match["op"])


def apply(plan: Plan, settings: tuple[Setting, ...]) -> Plan:
    """The plan with all settings; `UsageError` where they do not fit it or each other."""
    for setting in settings:
        if setting.op:
            plan = _tiled(plan, setting)
        elif setting.name == "threads":
            if setting.value > _MOST_THREADS:
                raise UsageError(f"--set {setting}: more than {_MOST_THREADS} threads")
            plan = plan.model_copy(update={"threads": setting.value})
        else:
            plan = _chunked(plan, setting.value)
    _check_batches(plan)
    return plan


def current(plan: Plan, setting: Setting) -> int | None:
    """The plan's value of a setting; None for a kernel's own default."""
    if setting.op:
        values = {dict(kernel.tile).get(setting.name) for kernel in _of_op(plan, setting.op)}
        return values.pop() if len(values) == 1 else None
    return plan.threads if setting.name == "threads" else plan.limits.max_chunk


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
            changed[key] = kernel.model_copy(update={"tile": tuple(sorted(tile.items()))})
    return plan.model_copy(update={"kernels": changed})


def _of_op(plan: Plan, op: str) -> list[Kernel]:
    return [kernel for kernel in plan.kernels.values() if kernel.op == op]


def _chunked(plan: Plan, tokens: int) -> Plan:
    """Chunks of `tokens`: the limit, the phase, and what its activations take."""
    if tokens > plan.limits.max_context:
        raise UsageError(
            f"--set chunk={tokens}: the plan's context is {plan.limits.max_context} tokens"
        )
    phase = plan.phase(PREFILL).model_copy(update={"max_tokens": tokens})
    return accounted(
        plan.model_copy(
            update={
                "limits": plan.limits.model_copy(update={"max_chunk": tokens}),
                "phases": tuple(phase if each.name == PREFILL else each for each in plan.phases),
            }
        )
    )


def _check_batches(plan: Plan) -> None:
    for kernel in plan.kernels.values():
        tile = dict(kernel.tile)
        batch = tile.get("rows", 4) * tile.get("streams", 4)
        if kernel.op in DECODE_OPS and _BATCH % batch:
            raise UsageError(
                f"--set {kernel.op}: rows x streams is {batch} (unset: 4 each), it must divide"
                f" {_BATCH}"
            )


def _known() -> str:
    return "; ".join(f"{op}: {', '.join(tiles)}" for op, tiles in _TILES.items())


def _power(value: int) -> bool:
    return value in (1, 2, 4, 8, 16)


def _bytes(value: int) -> bool:
    return value <= _MOST_BYTES


def _tile(value: int) -> bool:
    return 1 <= value <= _MOST_TILE


_Accepts = Callable[[int], bool]
_OF_DECODE: dict[str, _Accepts] = {"rows": _power, "streams": _power, "prefetch": _bytes}
_OF_PREFILL: dict[str, _Accepts] = {"tokens": _tile}
_TILES = dict.fromkeys(DECODE_OPS, _OF_DECODE) | dict.fromkeys(PREFILL_OPS, _OF_PREFILL)
"""op -> tile choice -> whether it can take a value."""
