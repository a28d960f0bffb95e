"""What was measured with a plan, stored beside it: `plan.hmp` -> `plan.measured.json`.

    {"format": "hmc-measured", "rows": [{"kind": "decode", "tokens": 128, "batch": 1,
     "tokens_per_second": 12.5, "low": 12.1, "high": 12.8, "predicted_tokens_per_second": 12.9,
     "plan_sha256": "..", "date": "..", "machine": "..", "by": "hmc bench"}]}

`tokens` is the length of the prompt (prefill) or the context in the middle of the run (decode). A
row holds for the plan whose digest it carries; rows of an earlier plan of that name are not shown.
A new row replaces that of the same plan, load and command. The prediction is that of the same
moment, where the machine's rates were known: the error is predicted / measured - 1 of tokens a
second, positive where it was too hopeful.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hmc.checkpoint.jsonfile import read_object
from hmc.errors import UsageError
from hmc.files import write_beside
from hmc.machine.model import Machine
from hmc.plan import Plan
from hmc.plan.file import canonical_json
from hmc.plan.phases import decode_phase, prefill_phase
from hmc.predict.cost import Call, CostModel
from hmc.predict.loads import Kind, Load, load_seconds
from hmc.predict.timeline import host_prefill, run

_FORMAT = "hmc-measured"
_TEST = re.compile(r"(?P<kind>pp|tg)(?P<tokens>\d+)(x(?P<batch>\d+))?(@(?P<context>\d+))?")


class Measured(BaseModel):
    """One figure: tokens/s of all sequences together, median with least and most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    tokens: int = Field(ge=0)
    batch: int = Field(default=1, ge=1)
    tokens_per_second: float = Field(gt=0, allow_inf_nan=False)
    low: float = Field(gt=0, allow_inf_nan=False)
    high: float = Field(gt=0, allow_inf_nan=False)
    predicted_tokens_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    plan_sha256: str = ""
    date: str = ""
    machine: str = ""
    by: str = ""

    @property
    def load(self) -> Load:
        """What it is a figure of."""
        return Load(self.kind, self.tokens, self.batch)


def digest(plan: Plan) -> str:
    """The hash that the plan's file carries."""
    return hashlib.sha256(canonical_json(plan).encode()).hexdigest()


def path_of(plan_path: str | os.PathLike[str]) -> Path:
    """Where the measurements of a plan file are."""
    return Path(plan_path).with_suffix(".measured.json")


def read(plan_path: str | os.PathLike[str], plan: Plan) -> list[Measured]:
    """The rows stored for this very plan, the latest of each load; `UsageError` for a file that is
    none.
    """
    mine = digest(plan)
    rows = [row for row in _rows(path_of(plan_path)) if row.plan_sha256 == mine]
    return list({row.load: row for row in rows}.values())


def record(plan_path: str | os.PathLike[str], plan: Plan, rows: Iterable[Measured]) -> Path:
    """Add rows for `plan` to what is stored beside it; returns the file. It is replaced whole."""
    target = path_of(plan_path)
    stamp = {"plan_sha256": digest(plan), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    new = [row.model_copy(update=stamp) for row in rows]
    replaced = {(row.plan_sha256, row.load, row.by) for row in new}
    kept = [r for r in _rows(target) if (r.plan_sha256, r.load, r.by) not in replaced] + new
    body = {"format": _FORMAT, "rows": [row.model_dump(exclude_defaults=True) for row in kept]}
    write_beside(target, json.dumps(body, indent=1))
    return target


def of_bench(path: str | os.PathLike[str]) -> list[Measured]:
    """The rows of a file that `hmc bench --json` wrote."""
    found = read_object(Path(path), UsageError)
    rows = found.get("rows")
    if not isinstance(rows, list):
        raise UsageError(f"{path}: not what `hmc bench --json` writes: it has no rows")
    result = []
    for row in rows:
        match = _TEST.fullmatch(str(row.get("test"))) if isinstance(row, dict) else None
        if match is None:
            raise UsageError(f"{path}: a row without a test such as pp512 or tg64@128")
        tokens, prefill = int(match["tokens"]), match["kind"] == "pp"
        values = {
            "kind": "prefill" if prefill else "decode",
            "tokens": tokens if prefill else int(match["context"] or 0) + tokens // 2,
            "batch": int(match["batch"] or 1),
            "tokens_per_second": row.get("tokens_per_second"),
            "low": row.get("min"),
            "high": row.get("max"),
            "date": str(found.get("date", "")),
            "machine": str(found.get("machine", "")),
            "by": str(found.get("command", "hmc bench")),
        }
        result.append(_measured(values, path))
    return result


def _rows(path: Path) -> list[Measured]:
    if not path.exists():
        return []
    found = read_object(path, UsageError)
    if found.get("format") != _FORMAT or not isinstance(found.get("rows"), list):
        raise UsageError(f"{path}: no file of measurements; move it away")
    return [_measured(row, path) for row in found["rows"]]


def _measured(values: Mapping[str, Any], path: str | os.PathLike[str]) -> Measured:
    try:
        return Measured.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {where}: {first['msg']}") from error


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
