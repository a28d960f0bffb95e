"""/live: what the page shows of the plan and of the work under way, and the times of its steps."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

from hmc.ranges import expert_intervals
from hmc.runtime.batching.stats import SchedulerStats
from hmc.serve.models import Model

_FIGURES = (
    *("running", "prefilling", "waiting", "batch", "phase", "kv_used", "kv_cached", "kv_total"),
    *("snapshots", "snapshots_total", "tokens_generated", "prompt_tokens", "prefix_tokens"),
    *("preemptions",),
    *("steps", "step_age", "step_seconds_total", "executor_seconds"),
)
"""Of the scheduler's figures, those that the page shows as they are."""


_FACTS = {
    *("architecture", "layers", "vocab", "experts", "top_k", "parameters", "active_parameters")
}


def live(model: Model) -> dict[str, Any]:
    """The figures now; `placement` is in `plan_facts`, since it does not change."""
    service = model.service
    result: dict[str, Any] = {
        "time": time.time(),
        "state": model.status if service is None else service.state,
        "reason": model.reason,
        "progress": 0.0 if service is None else service.progress,
        "prefill": {"decision": model.settings.prefill.reason, "process": None},
    }
    stats = model.stats()
    if service is None or stats is None:
        return result
    waits = sorted(service.ttft)
    if stats.prefill is not None:
        result["prefill"]["process"] = asdict(stats.prefill)
    lanes = {phase.name: phase.lanes for phase in model.plan.phases}
    result["scheduler"] = {
        **{name: getattr(stats, name) for name in _FIGURES},
        "lanes": lanes.get(stats.phase, 1),
        "step_seconds": statistics.median(stats.step_seconds) if stats.recent else None,
        "finished": dict(stats.finished),
    }
    result["ttft"] = (
        {"median": statistics.median(waits), "last": service.ttft[-1], "requests": len(waits)}
        if waits
        else None
    )
    return result


def step_times(model: Model) -> dict[str, Any]:
    """Steps made so far, and of the latest ones [seconds, seconds in the executor, sequences
    decoded, prompt tokens computed], oldest first; none while the model is not loaded.
    """
    stats = model.stats() or SchedulerStats()
    recent = [[s.seconds, s.executor, s.decoded, s.prefilled] for s in stats.recent]
    return {"steps": stats.steps, "recent": recent}


def plan_facts(model: Model) -> dict[str, Any]:
    """What does not change: the model, its limits, and where the experts of each layer are."""
    plan = model.plan
    return {
        "name": model.name,
        **plan.model.model_dump(include=_FACTS),
        "isa": plan.isa,
        "max_context": plan.limits.max_context,
        "max_batch": plan.limits.max_batch,
        "phases": [{"name": phase.name, "lanes": phase.lanes} for phase in plan.phases],
        "placement": [
            {
                "layer": each.layer,
                "tiers": {tier: expert_intervals(text) for tier, text in each.tiers.items()},
            }
            for each in plan.placement
        ],
    }
