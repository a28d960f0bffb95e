"""What the simulator says of a plan under a few ordinary loads, as a list of figures; where it can
say nothing, the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hmc.errors import HmcError
from hmc.plan import Plan
from hmc.predict.cost import CostModel
from hmc.predict.run import run_decode, run_prefill

PROMPTS = (512, 2048, 32_768)
CONTEXTS = (128, 4096)
BATCHES = (1, 4)

Kind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Load:
    """A prompt of `tokens`, or a decode step of `batch` sequences behind `tokens` tokens each."""

    kind: Kind
    tokens: int
    batch: int = 1

    @property
    def name(self) -> str:
        """pp512; tg@4096 or tg@4096x4, as `hmc bench` abbreviates."""
        if self.kind == "prefill":
            return f"pp{self.tokens}"
        return f"tg@{self.tokens}" + (f"x{self.batch}" if self.batch > 1 else "")

    @property
    def done(self) -> int:
        """Tokens that it makes: those of the prompt, or one of each sequence."""
        return self.tokens if self.kind == "prefill" else self.batch

    @property
    def what(self) -> str:
        """In words."""
        if self.kind == "prefill":
            return f"prefill of {self.tokens} tokens"
        together = f", {self.batch} sequences together" if self.batch > 1 else ""
        return f"decode at context {self.tokens}{together}"


@dataclass(frozen=True)
class Predicted:
    """Seconds of a load; None where there is a `reason` for having none."""

    load: Load
    seconds: float | None
    reason: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens a second, of all sequences together."""
        return None if self.seconds is None else self.load.done / self.seconds


def common_loads(plans: Sequence[Plan]) -> list[Load]:
    """The ordinary loads that every one of the plans can take, at least one of each kind."""
    context = min(plan.limits.max_context for plan in plans)
    batch = min(plan.limits.max_batch for plan in plans)
    prompts = [each for each in PROMPTS if each <= context] or [context]
    contexts = [each for each in CONTEXTS if each < context] or [context - 1]
    batches = [each for each in BATCHES if each <= batch]
    return [Load("prefill", tokens) for tokens in prompts] + [
        Load("decode", tokens, count) for tokens in contexts for count in batches
    ]


def predictions(plan: Plan, loads: Iterable[Load]) -> list[Predicted]:
    """Each load's; without seconds where the machine's rates are not known."""
    found = []
    for load in loads:
        try:
            found.append(Predicted(load, load_seconds(plan, CostModel(plan), load)))
        except HmcError as error:
            found.append(Predicted(load, None, str(error)))
    return found


def load_seconds(plan: Plan, model: CostModel, load: Load, phase: str = "") -> float:
    """Seconds of a load, by the phase that serves it or the one named."""
    if load.kind == "prefill":
        return run_prefill(plan, model, load.tokens, phase).seconds
    return run_decode(plan, model, load.tokens, load.batch, phase).seconds
