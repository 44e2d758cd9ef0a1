"""The edge agent's Prometheus metrics, in a registry of their own.

Speculation counts carry vLLM's own names (v1/spec_decode/metrics.py), so that its dashboards
work here too; what vLLM does not count is `picospec_edge_*`.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from picospec.protocol.messages import Verdict

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Seconds. Links and steps take milliseconds, first tokens up to a minute.
_STEP_BUCKETS = (
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08,
    0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0,
    20.0, 40.0, 80.0, 160.0, 600.0,
)  # fmt: skip
_MAX_POSITIONS = 64  # labels are bounded


@dataclass(frozen=True, slots=True)
class DrafterState:
    """What the drafter process says of itself when metrics are read."""

    alive: bool = False
    restarts: int = 0
    open_contexts: int = 0
    problem: str = ""  # why nothing is drafted now
    troubled_s: float = 0.0  # without a drafter that works, since the start


class EdgeMetrics:
    """Implements observer.PipelineObserver, and counts what the API sees."""

    def __init__(
        self,
        drafter: Callable[[], DrafterState] = DrafterState,
        open_streams: Callable[[], int] = lambda: 0,
    ) -> None:
        """Both are asked when the metrics are read."""
        self._registry = registry = CollectorRegistry()
        registry.register(_StateCollector(drafter, open_streams))

        def vllm(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vllm:spec_decode_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"picospec_edge_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"picospec_edge_{name}", text, registry=registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...] = _STEP_BUCKETS) -> Histogram:
            name = f"picospec_edge_{name}_seconds"
            return Histogram(name, text, buckets=buckets, registry=registry)

        self._num_drafts = vllm("num_drafts", "Verification steps that judged drafts.")
        self._num_draft_tokens = vllm("num_draft_tokens", "Draft tokens judged.")
        self._num_accepted_tokens = vllm("num_accepted_tokens", "Draft tokens accepted.")
        self._num_accepted_per_pos = vllm(
            "num_accepted_tokens_per_pos",
            "Draft tokens accepted, by their position among the drafts of a step.",
            "position",
        )
        self._drafted = counter("drafted_tokens", "Tokens drafted, those never judged included.")
        self._rollbacks = counter("rollbacks", "Chains given up after a rejection.")
        self._stale = counter("stale_tokens", "Draft tokens given up before they were judged.")
        self._resumes = counter(
            "resumes", "Times a generation was taken up again after the link broke."
        )
        self._bytes_up = counter("bytes_up", "Bytes of gRPC messages sent to the cloud.")
        self._bytes_down = counter("bytes_down", "Bytes of gRPC messages received from the cloud.")
        self._round_trip = seconds(
            "round_trip",
            "From sending drafts to their verdict, the cloud's queue and compute time left out.",
        )
        self._queue = seconds("verdict_queue", "How long judged drafts waited in the cloud.")
        self._compute = seconds("verdict_compute", "The engine step that judged the drafts.")
        self._first_token = seconds(
            "time_to_first_token",
            "From the request's arrival to its first token.",
            _REQUEST_BUCKETS,
        )
        self._inter_token = seconds(
            "inter_token_latency",
            "Time between output tokens; of tokens that came together each has its share.",
        )
        self._request_time = seconds(
            "request", "From the request's arrival to the end of its answer.", _REQUEST_BUCKETS
        )
        self._requests = counter("requests", "Generation requests.", "endpoint", "outcome")
        self._generations = counter("generations", "Generations that ended.", "outcome")
        self._active = gauge("active_generations", "Generations running now.")
        self._draft_length = gauge("draft_length", "Draft length chosen last, in tokens.")
        self._window = gauge("window", "Window chosen last, in tokens; 0: the drafter is stopped.")
        self._reachable = gauge("cloud_reachable", "1 while the cloud answers.")

    def exposition(self) -> bytes:
        """What GET /metrics answers."""
        return generate_latest(self._registry)

    # observer.PipelineObserver

    def round_trip(self, seconds: float) -> None:
        self._round_trip.observe(seconds)

    def verdict(self, verdict: Verdict) -> None:
        self._queue.observe(verdict.queue_us / 1e6)
        self._compute.observe(verdict.compute_us / 1e6)
        if not verdict.num_draft_tokens:
            return
        self._num_drafts.inc()
        self._num_draft_tokens.inc(verdict.num_draft_tokens)
        self._num_accepted_tokens.inc(verdict.num_accepted)
        for position in range(min(verdict.num_accepted, _MAX_POSITIONS)):
            self._num_accepted_per_pos.labels(str(position)).inc()

    def drafted(self, num_tokens: int) -> None:
        self._drafted.inc(num_tokens)

    def rollback(self) -> None:
        self._rollbacks.inc()

    def stale(self, num_tokens: int) -> None:
        self._stale.inc(num_tokens)

    def resumed(self) -> None:
        self._resumes.inc()

    def planned(self, draft_length: int, window: int) -> None:
        self._draft_length.set(draft_length)
        self._window.set(window)

    def bytes_up(self, num_bytes: int) -> None:
        self._bytes_up.inc(num_bytes)

    def bytes_down(self, num_bytes: int) -> None:
        self._bytes_down.inc(num_bytes)

    def generation_started(self) -> None:
        self._active.inc()

    def generation_finished(self, outcome: str) -> None:
        self._active.dec()
        self._generations.labels(outcome).inc()

    # The API

    def time_to_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` came together, `seconds` after the ones before."""
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)

    def request_finished(self, endpoint: str, outcome: str, seconds: float) -> None:
        self._requests.labels(endpoint, outcome).inc()
        self._request_time.observe(seconds)

    def cloud_reachable(self, reachable: bool) -> None:
        self._reachable.set(reachable)


class _StateCollector(Collector):
    """Asks for the state of others when it is read, instead of being told."""

    def __init__(
        self, drafter: Callable[[], DrafterState], open_streams: Callable[[], int]
    ) -> None:
        self._drafter = drafter
        self._open_streams = open_streams

    def collect(self) -> Iterator[Metric]:
        drafter = self._drafter()
        yield GaugeMetricFamily(
            "picospec_edge_drafter_alive", "1 while the drafter process runs.", drafter.alive
        )
        yield GaugeMetricFamily(
            "picospec_edge_drafter_contexts", "Contexts the drafter holds.", drafter.open_contexts
        )
        yield CounterMetricFamily(
            "picospec_edge_drafter_restarts", "Times the drafter was restarted.", drafter.restarts
        )
        yield CounterMetricFamily(
            "picospec_edge_drafter_troubled_seconds",
            "Seconds without a drafter that works: answers came at the cloud's pace.",
            drafter.troubled_s,
        )
        # A generation that leaves something behind shows here.
        yield GaugeMetricFamily(
            "picospec_edge_open_streams", "gRPC streams to the cloud.", self._open_streams()
        )
        yield GaugeMetricFamily("picospec_edge_asyncio_tasks", "asyncio tasks.", _num_tasks())


def _num_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # read off the loop, which has no tasks then
        return 0
