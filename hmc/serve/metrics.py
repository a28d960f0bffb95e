"""/metrics: the scheduler's figures and the latencies of requests as Prometheus text."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hmc.runtime.batching.process import PrefillState
from hmc.runtime.batching.stats import SchedulerStats
from hmc.runtime.tokens.generation import Timings
from hmc.serve.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TPOT = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 3)
_TOTAL = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Scheduler(service))
        own = self._registry
        self.ttft = Histogram(
            "hmc_time_to_first_token_seconds",
            "From submission to token one",
            buckets=_TTFT,
            registry=own,
        )
        self.tpot = Histogram(
            "hmc_time_per_output_token_seconds", "Mean after token one", buckets=_TPOT, registry=own
        )
        self.total = Histogram(
            "hmc_request_seconds", "From submission to the last token", buckets=_TOTAL, registry=own
        )
        self.http = Counter("hmc_http_requests", "HTTP answers", ("route", "status"), registry=own)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def observe(self, times: Timings) -> None:
        """Count the latencies of a choice that has ended with at least one token."""
        self.ttft.observe(times.ttft_s)
        self.total.observe(times.total_s)
        if times.new_tokens > 1:
            self.tpot.observe((times.total_s - times.ttft_s) / (times.new_tokens - 1))


class _Scheduler:
    """Reads the scheduler when asked."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The families."""
        service = self._service
        yield GaugeMetricFamily(
            "hmc_ready", "1 when requests are served", value=float(service.state == "ready")
        )
        if service.scheduler is None:
            return
        stats = service.scheduler.stats()
        yield from _gauges(stats)
        if stats.prefill is not None:
            yield from _prefill(stats.prefill)
        finished = CounterMetricFamily("hmc_requests", "Requests ended", labels=("reason",))
        for reason, count in sorted(stats.finished.items()):
            finished.add_metric((reason,), count)
        yield finished


def _prefill(state: PrefillState) -> Iterator[Metric]:
    """The prefill process."""
    for name, help_text, value in (
        ("up", "1 while the prefill process runs", float(state.alive)),
        ("prompts", "Prompts with the prefill process", state.prompts),
        ("tokens", "Tokens in the cache of the prompt it computes", state.tokens),
        ("silent_seconds", "Seconds it has not been heard of with a prompt", state.silent_seconds),
    ):
        yield GaugeMetricFamily(f"hmc_prefill_process_{name}", help_text, value=value)
    yield CounterMetricFamily(
        "hmc_prefill_process_restarts", "Prefill processes replaced", value=state.restarts
    )


def _gauges(stats: SchedulerStats) -> Iterator[Metric]:
    for name, help_text, value in (
        ("running", "Requests that decode", stats.running),
        ("prefilling", "Requests whose prompt is computed", stats.prefilling),
        ("waiting", "Requests in the queue", stats.waiting),
        ("kv_blocks_used", "Cache blocks of running requests", stats.kv_used),
        ("kv_blocks_cached", "Cache blocks kept for reuse", stats.kv_cached),
        ("kv_blocks_total", "Cache blocks", stats.kv_total),
        ("snapshots_kept", "States a sequence kept for reuse", stats.snapshots),
        ("snapshots_total", "Room for them; none: no prompt is reused", stats.snapshots_total),
        ("batch_size", "Sequences of the last decode step", stats.batch),
        ("step_age_seconds", "Age of the step under way", stats.step_age),
    ):
        yield GaugeMetricFamily(f"hmc_{name}", help_text, value=value)
    for name, help_text, value in (
        ("generated_tokens", "Tokens generated", stats.tokens_generated),
        ("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens),
        ("prefix_hits", "Prompts that began with known blocks", stats.prefix_hits),
        ("prefix_tokens", "Prompt tokens taken from the prefix cache", stats.prefix_tokens),
        ("steps", "Steps made", stats.steps),
        ("step_seconds", "Seconds in steps", stats.step_seconds_total),
        ("executor_seconds", "Seconds in the executor", stats.executor_seconds),
    ):
        yield CounterMetricFamily(f"hmc_{name}", help_text, value=value)
