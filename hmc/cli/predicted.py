"""Predicted against measured, as `hmc run` and `hmc bench` print it; loads the simulator only where
there are rates to predict with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hmc.errors import MachineError
from hmc.machine.here import how_to, machine_here
from hmc.plan import Plan

if TYPE_CHECKING:
    from hmc.bench.model import DecodeRow, PromptRow
    from hmc.predict.compared import Figure, Kind, Predictor
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
            from hmc.predict.compared import Predictor

            try:
                self._predictor = Predictor(plan, found)
            except MachineError as error:
                self.reason = f"no prediction: {error}"

    def run(self, times: Timings) -> list[Figure]:
        """The prompt and the decoding of one generation."""
        loads: list[tuple[Kind, int, float]] = []
        if times.ttft_s > 0:
            loads.append(("prefill", times.prompt_tokens, times.prompt_tokens_per_second))
        if times.decode_tokens_per_second > 0:
            middle = times.prompt_tokens + times.new_tokens // 2
            loads.append(("decode", middle, times.decode_tokens_per_second))
        return [
            each
            for kind, tokens, rate in loads
            for each in self._figure(kind, tokens, (rate,), rate)
        ]

    def bench(self, row: PromptRow | DecodeRow) -> dict[str, Any]:
        """The prediction of a row as its JSON has it, with the steps; {} where there is none."""
        record = row.record()
        rate = record["tokens_per_second"]
        batch = row.batch if row.kind == "decode" else 1
        found = self._figure(row.kind, row.middle, row.rates, rate, row.phase, batch)
        if not found or self._predictor is None:
            return {}
        steps = self._predictor.steps(row.kind, row.middle, row.by_step, row.phase, batch)
        return {
            "predicted_tokens_per_second": round(found[0].predicted, 3),
            "error": round(found[0].error, 4),
            "steps": steps,
        }

    def steps(self, times: Timings, recorder: Recorder) -> dict[str, Any]:
        """Seconds of every step of a recorded generation: of the prompt, and of a token."""
        if self._predictor is None:
            return {}
        tokens = max(1, times.new_tokens - 1)
        first = self._predictor.phase("prefill", times.prompt_tokens)
        later = self._predictor.phase("decode", 1)
        decode = {step: each / tokens for step, each in recorder.with_python(later).items()}
        prompt = recorder.with_python(first)
        middle = times.prompt_tokens + times.new_tokens // 2
        return {
            "prefill": self._predictor.steps("prefill", times.prompt_tokens, prompt),
            "decode": self._predictor.steps("decode", middle, decode) if decode else [],
        }

    def line(self, figures: Sequence[Figure]) -> str:
        """One line: `predicted prompt 80.1 tok/s, measured 78.0 (+2.7 %) | decode ...`."""
        if not figures:
            return self.reason
        names = {"prefill": "prompt", "decode": "decode"}
        return "predicted " + " | ".join(
            f"{names[each.kind]} {each.predicted:.1f} tok/s, measured {each.measured:.1f}"
            f" (error {each.error:+.1%})"
            for each in figures
        )

    def store(self, by: str) -> None:
        """Keep all figures so far beside the plan's file; where that cannot be written, say so."""
        if not self._path or not self._figures:
            return
        from hmc.predict.compared import keep

        if problem := keep(self._path, self._plan, self._figures, by):
            click.echo(f"[{problem}]", err=True)

    def _figure(
        self,
        kind: Kind,
        tokens: int,
        rates: Sequence[float],
        measured: float,
        phase: str = "",
        batch: int = 1,
    ) -> list[Figure]:
        if self._predictor is None:
            return []
        try:
            found = self._predictor.figure(kind, tokens, rates, measured, phase, batch)
        except MachineError as error:
            self._predictor, self.reason = None, f"no prediction: {error}"
            return []
        self._figures.append(found)
        return [found]
