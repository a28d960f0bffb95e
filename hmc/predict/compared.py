"""Predicted against measured: the simulator's figures of a load beside what ran, as a whole and by
step, and stored beside the plan (hmc/predict/measured.py has the file).

The error is predicted / measured - 1 of tokens a second: positive where the prediction was too
hopeful.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hmc.errors import HmcError
from hmc.machine import Machine
from hmc.plan import Plan
from hmc.plan.phases import decode_phase, prefill_phase
from hmc.predict import measured as store
from hmc.predict.cost import Call, CostModel
from hmc.predict.run import run_decode, run_prefill
from hmc.predict.timeline import host_prefill, run

Kind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Figure:
    """Tokens a second of one load: a prompt of `tokens`, or `batch` sequences decoding together,
    each behind `tokens` (the middle of the run).
    """

    kind: Kind
    tokens: int
    predicted: float
    measured: float
    low: float
    high: float
    batch: int = 1

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": self.kind,
            "tokens": self.tokens,
            **({"batch": self.batch} if self.batch > 1 else {}),
            "predicted_tokens_per_second": self.predicted,
            "measured_tokens_per_second": self.measured,
            "error": self.error,
        }


class Predictor:
    """Predictions of what the runtime does with a plan on the rates of `machine`, by the phase that
    serves a load, or by one named.

    Raises `MachineError` when these lack what the plan uses.
    """

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self.plan = plan
        self._model = CostModel(plan, machine)

    def phase(self, kind: Kind, tokens: int) -> str:
        """The phase of a prompt of `tokens`, or of decoding so many sequences."""
        choose = prefill_phase if kind == "prefill" else decode_phase
        return choose(self.plan, tokens)

    def rate(self, kind: Kind, tokens: int, phase: str = "", batch: int = 1) -> float:
        """Tokens a second of a load."""
        phase = phase or self.phase(kind, tokens if kind == "prefill" else batch)
        if kind == "prefill":
            return tokens / run_prefill(self.plan, self._model, tokens, phase).seconds
        return batch / run_decode(self.plan, self._model, tokens, batch, phase).seconds

    def figure(
        self,
        kind: Kind,
        tokens: int,
        rates: Sequence[float],
        measured: float,
        phase: str = "",
        batch: int = 1,
    ) -> Figure:
        """The prediction of a load beside its median rate and all its rates."""
        predicted = self.rate(kind, tokens, phase, batch)
        return Figure(kind, tokens, predicted, measured, min(rates), max(rates), batch)

    def steps(
        self,
        kind: Kind,
        tokens: int,
        measured: Mapping[int, float],
        name: str = "",
        batch: int = 1,
    ) -> list[dict[str, Any]]:
        """Seconds of every step in the order of the phase (`name`, or the plan's choice), of a
        whole prompt or of one token of each of `batch` sequences.
        """
        phase = self.plan.phase(name or self.phase(kind, tokens if kind == "prefill" else batch))
        if kind == "prefill":
            calls = host_prefill(phase, tokens, self._model)
        else:
            calls = [Call(batch, tokens, batch)]
        timelines = [run(phase, call, self._model) for call in calls]
        return [
            {
                "step": step.id,
                "op": step.op,
                "layer": step.layer,
                "predicted_s": sum(each.costs[number].seconds for each in timelines),
                "measured_s": measured.get(step.id, 0.0),
                "bound": timelines[-1].costs[number].bound,
            }
            for number, step in enumerate(phase.steps)
        ]


def keep(plan_path: str | os.PathLike[str], plan: Plan, figures: Sequence[Figure], by: str) -> str:
    """Store figures beside the plan; returns "" or why that was not possible (a plan in a folder
    that cannot be written is no reason for a run to fail).
    """
    rows = [
        store.Measured(
            kind=each.kind,
            tokens=each.tokens,
            batch=each.batch,
            tokens_per_second=each.measured,
            low=each.low,
            high=each.high,
            predicted_tokens_per_second=each.predicted,
            by=by,
            machine=plan.machine.cpu,
        )
        for each in figures
    ]
    try:
        store.record(plan_path, plan, rows)
    except (OSError, HmcError) as error:
        return f"not stored beside the plan: {error}"
    return ""
