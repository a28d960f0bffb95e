"""What is said of a plan in a few lines: memory, and what is predicted of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hmc.cli.output import size
from hmc.errors import MachineError
from hmc.machine.detect import how_to, machine_here
from hmc.plan import Plan

_PROMPT = 512


def memory(plan: Plan) -> Iterator[str]:
    """A line for each device."""
    for device, total in plan.ledger_totals.items():
        yield f"  {device} memory: {size(total)} of {size(plan.machine.memory_of(device))}"


def head_line(screened: Mapping[str, int], before: str = "") -> str:
    """How many rows of a screened LM head were computed; "" where none was."""
    if not (logits := screened.get("logits", 0)):
        return ""
    whole = screened.get("blocks", 0)
    rows = f"{screened.get('rows', 0) / logits:.1f} rows a token"
    return f"{before}LM head screened: {rows}" + f", {whole} blocks whole" * (whole > 0)


def prediction(plan: Plan) -> str:
    """How fast the plan will be, on its machine or, where that has no rates, on this one if it is
    the same.
    """
    machine = plan.machine if plan.machine.rates is not None else machine_here(plan.machine)
    if machine is None:
        return how_to()
    from hmc.predict.run import simulate

    prompt = min(_PROMPT, plan.limits.max_context)
    try:
        found = simulate(plan, machine=machine, prompt=prompt)
    except MachineError as error:
        return f"no prediction: {error}"
    return (
        f"predicted: the first token of a prompt of {prompt} after {found.ttft:.3f} s"
        f" ({found.prefill_rate:.1f} tok/s), decode {found.decode_rate:.1f} tok/s"
    )
