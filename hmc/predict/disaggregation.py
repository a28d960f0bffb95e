"""What a prefill process beside decoding would do to a prompt's first token and to the tokens of
others, predicted by the cost model; hides how rates divide with the cores.

Assumed, because a machine's rates are those of all its cores together:
    * n of N cores multiply n/N as fast.
    * n cores read min(all that the memory gives, n * CORE_READ), at least n/N of it.
    * decode matmuls whose measured rate is near that of plain reading are bound by the memory and
      follow it; others follow the cores.
    * both sides share the memory: decoding has what prefill leaves, at least n/N of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.machine.model import Machine, Rate
from hmc.plan import Plan
from hmc.plan.phases import PREFILL, chunk_tokens, decode_phase
from hmc.predict.cost import Call, CostModel
from hmc.predict.run import prefill_timelines
from hmc.predict.timeline import run

CORE_READ = 12e9
"""Bytes/s that one core reads at most, assumed: some 16 lines of 64 bytes under way at 85 ns each
(Little's law). Eight to thirty cores fill the memory of a server, two that of a small machine."""

_MEMORY_BOUND = 0.75
"""A decode matmul that reaches this share of plain reading is bound by the memory."""


@dataclass(frozen=True)
class Load:
    """`batch` sequences with `prompt` tokens each decode when another `prompt` tokens arrive."""

    prompt: int
    batch: int


@dataclass(frozen=True)
class Outlook:
    """Seconds: until the first token of the prompt that arrives, between two tokens of those that
    decode meanwhile, and between two tokens of the same when there is no prompt.
    """

    ttft: float
    tpot: float
    tpot_alone: float


def interleaved(plan: Plan, machine: Machine, load: Load, *, cores: int, of: int) -> Outlook:
    """Chunks of the prompt by turns with decode steps, on `cores` of the `of` cores whose rates
    the machine declares. `MachineError` when it declares none.
    """
    model = CostModel(plan, _share(machine, cores / of, _read(machine, cores, of)))
    seconds, calls, _ = _prefill(plan, model, load.prompt, load.batch)
    step = _decode(plan, model, load)
    return Outlook(seconds + calls * step, seconds / calls + step, step)


def divided(
    plan: Plan, machine: Machine, load: Load, *, decode: int, prefill: int, of: int
) -> Outlook:
    """The prompt on `prefill` cores while others decode on `decode`."""
    beside = CostModel(plan, _share(machine, prefill / of, _read(machine, prefill, of)))
    seconds, _, size = _prefill(plan, beside, load.prompt, 0)
    quiet = _read(machine, decode, of)
    everything = machine.known_rates.read_all
    left = max(everything - size / seconds, everything * decode / of)
    busy = CostModel(plan, _share(machine, decode / of, min(quiet, left)))
    alone = CostModel(plan, _share(machine, decode / of, quiet))
    step = _decode(plan, busy, load)
    return Outlook(seconds + step, step, _decode(plan, alone, load))


def _prefill(plan: Plan, model: CostModel, prompt: int, decoding: int) -> tuple[float, int, float]:
    """(seconds, calls, bytes read) of a prompt."""
    phase = plan.phase(PREFILL)
    count = chunk_tokens(plan, PREFILL, prompt, decoding)
    calls = [
        Call(min(count, prompt - first), first, logits=first + count >= prompt)
        for first in range(0, prompt, count)
    ]
    seconds = size = 0.0
    for weight, timeline in prefill_timelines(phase, calls, model):
        seconds += weight * timeline.result
        size += weight * sum(
            cost.bytes.get("host", 0.0) + cost.bytes.get("remote", 0.0) for cost in timeline.costs
        )
    return seconds, len(calls), size


def _decode(plan: Plan, model: CostModel, load: Load) -> float:
    phase = plan.phase(decode_phase(plan, load.batch))
    return run(phase, Call(load.batch, load.prompt, load.batch), model).result


def _read(machine: Machine, cores: int, of: int) -> float:
    everything = machine.known_rates.read_all
    return min(everything, max(everything * cores / of, cores * CORE_READ))


def _share(machine: Machine, share: float, read: float) -> Machine:
    """The machine with `share` of its cores, which read `read` bytes/s."""
    rates = machine.known_rates
    everything = rates.read_all

    def reading(rate: Rate) -> float:
        return read / everything if rate.value >= _MEMORY_BOUND * everything else share

    smaller = rates.model_copy(
        update={
            "read": tuple(rate.times(read / everything) for rate in rates.read),
            "gemv": tuple(point.times(reading(point.rate)) for point in rates.gemv),
            "dot": rates.dot.times(share),
            "attend": rates.attend.times(share),
        }
    )
    return machine.model_copy(update={"rates": smaller})
