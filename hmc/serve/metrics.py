"""/metrics: the scheduler's figures and the latencies of requests as Prometheus text."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hmc.runtime.batching.stats import SchedulerStats
from hmc.runtime.tokens.generation import Timings
from hmc.serve.service import Service
from hmc.version import VERSION

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TPOT = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 3)
_TOTAL = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self, service: Service) -> None:
        self._registry = own = CollectorRegistry()
        own.register(_Scheduler(service))
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
        self.unknown = Counter(
            "hmc_unknown_fields", "Fields of bodies that were ignored", ("route",), registry=own
        )

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
        built = {"version": VERSION, "model": service.plan.model.architecture}
        built |= {"isa": service.plan.isa, "plan_by": service.plan.hmc_version}
        info = GaugeMetricFamily("hmc_build_info", "What runs", labels=tuple(built))
        info.add_metric(tuple(built.values()), 1)
        yield info
        if service.scheduler is None:
            return
        stats = service.scheduler.stats()
        for name, value, help_text in _gauges(stats):
            yield GaugeMetricFamily(f"hmc_{name}", help_text, value=value)
        for name, value, help_text in _counters(stats):
            yield CounterMetricFamily(f"hmc_{name}", help_text, value=value)
        finished = CounterMetricFamily("hmc_requests", "Requests ended", labels=("reason",))
        for reason, count in sorted(stats.finished.items()):
            finished.add_metric((reason,), count)
        yield finished


def _gauges(stats: SchedulerStats) -> Iterator[tuple[str, float, str]]:
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


def _counters(stats: SchedulerStats) -> Iterator[tuple[str, float, str]]:
    yield "generated_tokens", stats.tokens_generated, "Tokens generated"
    yield "prompt_tokens", stats.prompt_tokens, "Prompt tokens computed"
    yield "prefix_hits", stats.prefix_hits, "Prompts that began with known blocks"
    yield "prefix_tokens", stats.prefix_tokens, "Prompt tokens taken from the prefix cache"
    yield "steps", stats.steps, "Steps made"
    yield "step_seconds", stats.step_seconds_total, "Seconds in steps"
    yield "executor_seconds", stats.executor_seconds, "Seconds in the executor"
    if stats.prefill is not None:
        restarts = stats.prefill.restarts
        yield "prefill_process_restarts", restarts, "Prefill processes replaced"
