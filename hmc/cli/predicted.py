"""Predicted against measured, as `hmc run` and `hmc bench` print it; loads the simulator only where
there are rates to predict with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hmc.errors import HmcError, MachineError
from hmc.machine.detect import how_to, machine_here
from hmc.plan import Plan

if TYPE_CHECKING:
    from hmc.bench.model import Row
    from hmc.predict.loads import Load
    from hmc.predict.measured import Figure, Predictor
    from hmc.runtime.host.trace import Recorder
    from hmc.runtime.tokens.generation import Timings


class Comparison:
    """What was predicted for what a plan does here, or `reason` why nothing was."""

    def __init__(self, plan: Plan, machine: str | None, workers: int, plan_path: str = "") -> None:
        """`plan_path` is the plan's file, which figures are stored beside ("": nowhere)."""
        self._plan, self._path = plan, plan_path if Path(plan_path).is_file() else ""
        self._figures: list[Figure] = []
        self.reason = ""
        self._predictor: Predictor | None = None
        found = machine_here(plan.machine, machine)
        if found is None:
            self.reason = how_to()
        elif found.cores != workers:
            self.reason = (
                f"no prediction: the rates of {found.name} are those of {found.cores} cores, this"
                f" ran on {workers} threads"
            )
        else:
            from hmc.predict.measured import Predictor

            try:
                self._predictor = Predictor(plan, found)
            except MachineError as error:
                self.reason = f"no prediction: {error}"

    def run(self, times: Timings) -> list[Figure]:
        """The prompt and the decoding of one generation."""
        prompt = times.prompt_tokens_per_second if times.ttft_s > 0 else 0.0
        rates = (prompt, times.decode_tokens_per_second)
        found = [self._figure(*each) for each in zip(_loads(times), rates, strict=True) if each[1]]
        return [figure for figure in found if figure is not None]

    def bench(self, row: Row) -> dict[str, Any]:
        """The prediction of a row as its JSON has it, with the steps; {} where there is none."""
        found = self._figure(row.load, *row.rates, phase=row.phase)
        if found is None or self._predictor is None:
            return {}
        return {
            "predicted_tokens_per_second": round(found.predicted_tokens_per_second, 3),
            "error": round(found.error, 4),
            "steps": self._predictor.steps(row.load, row.by_step, row.phase),
        }

    def steps(self, times: Timings, recorder: Recorder) -> dict[str, Any]:
        """Seconds of every step of a recorded generation: of the prompt, and of a token."""
        if self._predictor is None:
            return {}
        prompt, decode = _loads(times)
        first = recorder.with_python(self._predictor.phase("prefill", prompt.tokens))
        later = recorder.with_python(self._predictor.phase("decode", 1))
        tokens = max(1, times.new_tokens - 1)
        each = {step: seconds / tokens for step, seconds in later.items()}
        return {
            "prefill": self._predictor.steps(prompt, first),
            "decode": self._predictor.steps(decode, each) if each else [],
        }

    def line(self, figures: Sequence[Figure]) -> str:
        """One line: `predicted prompt 80.1 tok/s, measured 78.0 (+2.7 %) | decode ...`."""
        if not figures:
            return self.reason
        names = {"prefill": "prompt", "decode": "decode"}
        return "predicted " + " | ".join(
            f"{names[each.kind]} {each.predicted_tokens_per_second:.1f} tok/s, measured"
            f" {each.tokens_per_second:.1f} (error {each.error:+.1%})"
            for each in figures
        )

    def store(self, by: str) -> None:
        """Keep all figures so far beside the plan's file; where that cannot be written, say so: a
        plan in a folder that cannot be written is no reason for a run to fail."""
        if not self._path or not self._figures:
            return
        from hmc.predict.measured import record

        rows = [each.model_copy(update={"by": by}) for each in self._figures]
        try:
            record(self._path, self._plan, rows)
        except (OSError, HmcError) as error:
            click.echo(f"[not stored beside the plan: {error}]", err=True)

    def _figure(self, load: Load, *rates: float, phase: str = "") -> Figure | None:
        if self._predictor is None:
            return None
        try:
            found = self._predictor.figure(load, rates, phase)
        except MachineError as error:
            self._predictor, self.reason = None, f"no prediction: {error}"
            return None
        self._figures.append(found)
        return found


def _loads(times: Timings) -> tuple[Load, Load]:
    """The prompt of a generation, and its decoding in the middle."""
    from hmc.predict.loads import Load

    middle = times.prompt_tokens + times.new_tokens // 2
    return Load("prefill", times.prompt_tokens), Load("decode", middle)
