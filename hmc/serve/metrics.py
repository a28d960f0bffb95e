"""/metrics: the schedulers' figures and the latencies of requests as Prometheus text.

Where there are several models, what is said of one of them has its name as label `model_name`; a
server of one model has no such label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hmc.runtime.batching.stats import SchedulerStats
from hmc.runtime.tokens.generation import Timings
from hmc.serve.log import lost_lines
from hmc.serve.models import Model, Models
from hmc.version import VERSION

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TPOT = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 3)
_TOTAL = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)

Figures = Iterator[tuple[str, float, str]]
"""Name, value and what it says."""


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self, models: Models) -> None:
        self._registry = own = CollectorRegistry()
        labels = _labels(models)
        own.register(_Collector(models))
        ttft = Histogram(
            "hmc_time_to_first_token_seconds",
            "From submission to token one",
            labels,
            buckets=_TTFT,
            registry=own,
        )
        tpot = Histogram(
            "hmc_time_per_output_token_seconds",
            "Mean after token one",
            labels,
            buckets=_TPOT,
            registry=own,
        )
        total = Histogram(
            "hmc_request_seconds",
            "From submission to the last token",
            labels,
            buckets=_TOTAL,
            registry=own,
        )
        self.http = Counter("hmc_http_requests", "HTTP answers", ("route", "status"), registry=own)
        self.unknown = Counter(
            "hmc_unknown_fields", "Fields of bodies that were ignored", ("route",), registry=own
        )
        self._latencies = {
            model.name: Latencies(
                *(each.labels(model.name) if labels else each for each in (ttft, tpot, total))
            )
            for model in models
        }

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def of(self, name: str) -> Latencies:
        """Those of a model."""
        return self._latencies[name]


class Latencies:
    """The latencies of one model's requests."""

    def __init__(self, ttft: Histogram, tpot: Histogram, total: Histogram) -> None:
        self._ttft, self._tpot, self._total = ttft, tpot, total

    def observe(self, times: Timings) -> None:
        """Count those of a choice that has ended with at least one token."""
        self._ttft.observe(times.ttft_s)
        self._total.observe(times.total_s)
        if times.new_tokens > 1:
            self._tpot.observe((times.total_s - times.ttft_s) / (times.new_tokens - 1))


class _Collector:
    """Reads the models and their schedulers when asked."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._labels = _labels(models)

    def collect(self) -> Iterator[Metric]:
        """The families."""
        models = self._models
        ready = float(models.state == "ready")
        yield GaugeMetricFamily("hmc_ready", "1 when requests are served", value=ready)
        built = ("version", "model", "isa", "plan_by")
        info = GaugeMetricFamily("hmc_build_info", "What runs", labels=(*built, *self._labels))
        for model in models:
            plan = model.plan
            about = (VERSION, plan.model.architecture, plan.isa, plan.hmc_version)
            info.add_metric((*about, *self._of(model)), 1)
        yield info
        about_lost = "Lines of the log that could not be written"
        yield CounterMetricFamily("hmc_log_lines_lost", about_lost, value=lost_lines())
        yield from self._families(GaugeMetricFamily, _states)
        yield from self._families(CounterMetricFamily, _moves)
        yield from self._families(GaugeMetricFamily, _of_scheduler(_gauges))
        yield from self._families(CounterMetricFamily, _of_scheduler(_counters))
        labels = ("reason", *self._labels)
        finished = CounterMetricFamily("hmc_requests", "Requests ended", labels=labels)
        for model in models:
            if (stats := model.stats()) is not None:
                for reason, count in sorted(stats.finished.items()):
                    finished.add_metric((reason, *self._of(model)), count)
        yield finished

    def _families(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        figures: Callable[[Model], Figures],
    ) -> Iterator[Metric]:
        """A family of each figure, with every model that has it."""
        found: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for model in self._models:
            for name, value, about in figures(model):
                if name not in found:
                    found[name] = kind(f"hmc_{name}", about, labels=self._labels)
                found[name].add_metric(self._of(model), value)
        yield from found.values()

    def _of(self, model: Model) -> tuple[str, ...]:
        return (model.name,) if self._labels else ()


def _labels(models: Models) -> tuple[str, ...]:
    return () if models.only else ("model_name",)


def _of_scheduler(figures: Callable[[SchedulerStats], Figures]) -> Callable[[Model], Figures]:
    def of_model(model: Model) -> Figures:
        if (stats := model.stats()) is not None:
            yield from figures(stats)

    return of_model


def _states(model: Model) -> Figures:
    yield "model_loaded", model.loaded, "1 while the model is in memory"


def _moves(model: Model) -> Figures:
    yield "model_loads", model.loads, "Times the model was loaded"
    yield "model_unloads", model.unloads, "Times the model was unloaded"


def _gauges(stats: SchedulerStats) -> Figures:
    yield "running", stats.running, "Requests that decode"
    yield "prefilling", stats.prefilling, "Requests whose prompt is computed"
    yield "waiting", stats.waiting, "Requests in the queue"
    yield "kv_blocks_used", stats.kv_used, "Cache blocks of running requests"
    yield "kv_blocks_cached", stats.kv_cached, "Cache blocks kept for reuse"
    yield "kv_blocks_total", stats.kv_total, "Cache blocks"
    yield "snapshots_kept", stats.snapshots, "States a sequence kept for reuse"
    yield "snapshots_total", stats.snapshots_total, "Room for them; none: no prompt is reused"
    yield "batch_size", stats.batch, "Sequences of the last decode step"
    yield "step_age_seconds", stats.step_age, "Age of the step under way"
    if (state := stats.prefill) is not None:
        yield "prefill_process_up", state.alive, "1 while the prefill process runs"
        yield "prefill_process_prompts", state.prompts, "Prompts with the prefill process"
        about = "Tokens in the cache of the prompt it computes"
        yield "prefill_process_tokens", state.tokens, about
        about = "Seconds it has not been heard of with a prompt"
        yield "prefill_process_silent_seconds", state.silent_seconds, about


def _counters(stats: SchedulerStats) -> Figures:
    yield "generated_tokens", stats.tokens_generated, "Tokens generated"
    yield "prompt_tokens", stats.prompt_tokens, "Prompt tokens computed"
    yield "prefix_hits", stats.prefix_hits, "Prompts that began with known blocks"
    yield "prefix_tokens", stats.prefix_tokens, "Prompt tokens taken from the prefix cache"
    yield "preemptions", stats.preemptions, "Requests that made room in the cache for others"
    yield "restored_tokens", stats.tokens_restored, "Tokens of their answers stored again"
    yield "steps", stats.steps, "Steps made"
    yield "step_seconds", stats.step_seconds_total, "Seconds in steps"
    yield "executor_seconds", stats.executor_seconds, "Seconds in the executor"
    if stats.prefill is not None:
        restarts = stats.prefill.restarts
        yield "prefill_process_restarts", restarts, "Prefill processes replaced"
