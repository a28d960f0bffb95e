"""Predicted against measured: the simulator's figures of a load beside what ran, as a whole and by
step.

The error is predicted / measured - 1 of tokens a second: positive where the prediction was too
hopeful.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from hmc.machine.model import Machine
from hmc.plan import Plan
from hmc.plan.phases import decode_phase, prefill_phase
from hmc.predict.cost import Call, CostModel
from hmc.predict.loads import Kind, Load, load_seconds
from hmc.predict.measured import Measured
from hmc.predict.timeline import host_prefill, run


class Figure(Measured):
    """A measured figure with its prediction."""

    predicted_tokens_per_second: float

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted_tokens_per_second / self.tokens_per_second - 1

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": self.kind,
            "tokens": self.tokens,
            **({"batch": self.batch} if self.batch > 1 else {}),
            "predicted_tokens_per_second": self.predicted_tokens_per_second,
            "measured_tokens_per_second": self.tokens_per_second,
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

    def rate(self, load: Load, phase: str = "") -> float:
        """Tokens a second of a load."""
        return load.done / load_seconds(self.plan, self._model, load, phase)

    def figure(self, load: Load, rates: Sequence[float], phase: str = "") -> Figure:
        """The prediction of a load beside the rates that were measured."""
        return Figure(
            **vars(load),
            tokens_per_second=median(rates),
            low=min(rates),
            high=max(rates),
            predicted_tokens_per_second=self.rate(load, phase),
            machine=self.plan.machine.cpu,
        )

    def steps(
        self, load: Load, measured: Mapping[int, float], phase: str = ""
    ) -> list[dict[str, Any]]:
        """Seconds of every step in the order of the phase, of a whole prompt or of one token of
        each sequence.
        """
        found = self.plan.phase(phase or self.phase(load.kind, load.done))
        if load.kind == "prefill":
            calls = host_prefill(found, load.tokens)
        else:
            calls = [Call(load.batch, load.tokens, load.batch)]
        timelines = [run(found, call, self._model) for call in calls]
        return [
            {
                "step": step.id,
                "op": step.op,
                "layer": step.layer,
                "predicted_s": sum(each.costs[number].seconds for each in timelines),
                "measured_s": measured.get(step.id, 0.0),
                "bound": timelines[-1].costs[number].bound,
            }
            for number, step in enumerate(found.steps)
        ]
