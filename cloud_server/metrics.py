"""What the cloud server counts, for Prometheus.

Where vLLM has a name for it, it is vLLM's (vllm/v1/spec_decode/metrics.py and
vllm/v1/metrics/loggers.py), with its labels, so that dashboards made for vLLM work here;
the rest is called `picospec_cloud_*`. Each instance has its own registry.
"""

from functools import partial
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from cloud_server.config import MetricsConfig
from cloud_server.engine.interface import EngineStats
from cloud_server.kv_room import KVRoom, Refusal
from picospec.protocol.messages import ModelCard, Opened, Verdict

# Seconds. Milliseconds matter at the low end, a queue under load at the high end.
LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1,
    0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
FIRST_TOKEN_BUCKETS_S = (*LATENCY_BUCKETS_S, 20.0, 40.0, 80.0)
HANDLING_BUCKETS_S = (
    0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05,
)  # fmt: skip


class CloudMetrics:
    """All metrics of one server. Written on its event loop, read by the scraper's thread."""

    def __init__(self, card: ModelCard) -> None:
        self.registry = CollectorRegistry()
        self._vllm_labels = {"model_name": card.model_id, "engine": "0"}
        self._last_stats = EngineStats()
        self._speculation(card.limits.max_draft_tokens)
        self._engine()
        self._sessions()
        self._latencies()

    def _speculation(self, max_draft_tokens: int) -> None:
        counter, own = partial(self._vllm, Counter), partial(self._own, Counter)
        self._num_drafts = counter("spec_decode_num_drafts", "Number of spec decoding drafts.")
        self._num_draft_tokens = counter("spec_decode_num_draft_tokens", "Number of draft tokens.")
        self._num_accepted_tokens = counter(
            "spec_decode_num_accepted_tokens", "Number of accepted tokens."
        )
        per_pos = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens per draft position.",
            [*self._vllm_labels, "position"],
            registry=self.registry,
        )
        self._accepted_per_pos = [
            per_pos.labels(*self._vllm_labels.values(), str(position))
            for position in range(max_draft_tokens)
        ]
        self._rollbacks = own("rollbacks", "Verdicts that did not accept all of their drafts.")
        self._stale_tokens = own(
            "stale_draft_tokens", "Drafts dropped because their epoch was over."
        )

    def _engine(self) -> None:
        counter, gauge = partial(self._vllm, Counter), partial(self._vllm, Gauge)
        self._running = gauge(
            "num_requests_running", "Number of requests in model execution batches."
        )
        self._waiting = gauge("num_requests_waiting", "Number of requests waiting to be processed.")
        self._kv_usage = gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self._preemptions = counter(
            "num_preemptions", "Cumulative number of preemption from the engine."
        )
        self._prompt_tokens = counter("prompt_tokens", "Number of prefill tokens processed.")
        self._generation_tokens = counter(
            "generation_tokens", "Number of generation tokens processed."
        )
        self._prefix_queries = counter(
            "prefix_cache_queries", "Prefix cache queries, in queried tokens."
        )
        self._prefix_hits = counter("prefix_cache_hits", "Prefix cache hits, in cached tokens.")
        self._forwarded_tokens = self._own(
            Counter, "forwarded_tokens", "Tokens forwarded: prompts, drafts and padding."
        )
        self._healthy = self._own(Gauge, "engine_healthy", "1 while the engine serves.")
        self._tasks = self._own(Gauge, "asyncio_tasks", "asyncio tasks of the gRPC process.")

    def _sessions(self) -> None:
        counter = partial(self._own, Counter)
        self._active = self._own(Gauge, "sessions_active", "Generations being served.")
        self._held = self._own(Gauge, "sessions_held", "Sessions that wait for their edge.")
        self._evicted = counter(
            "sessions_evicted", "Held sessions whose KV cache was given to others."
        )
        self._queued = self._own(
            Gauge, "sessions_waiting", "Generations that wait for room in the KV cache."
        )
        self._kv_tokens = self._own(Gauge, "kv_tokens", "Tokens that the KV cache holds.")
        self._kv_tokens_reserved = self._own(
            Gauge, "kv_tokens_reserved", "Tokens of KV cache that generations have reserved."
        )
        self._no_room = counter(
            "sessions_without_room", "Generations refused for want of room, by reason.", ["reason"]
        )
        for reason in Refusal:
            self._no_room.labels(reason.value)
        self._outcomes = counter("sessions", "Sessions ended, by outcome.", ["outcome"])
        self._protocol_errors = counter(
            "protocol_errors", "Frames refused, by the field at fault.", ["field"]
        )
        self._bytes_received = counter("received_bytes", "Message payloads received from edges.")
        self._bytes_sent = counter("sent_bytes", "Message payloads sent to edges.")
        self._frames_received = counter("frames_received", "Frames from edges.")
        self._frames_sent = counter("frames_sent", "Frames to edges.")

    def _latencies(self) -> None:
        def seconds(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"picospec_cloud_{name}_seconds", text, registry=self.registry, buckets=buckets
            )

        self._queue = seconds(
            "verdict_queue", "From a draft's arrival to the step that judged it.", LATENCY_BUCKETS_S
        )
        self._compute = seconds("verdict_compute", "The step that judged.", LATENCY_BUCKETS_S)
        self._first_token = seconds(
            "time_to_first_token", "From Open to the first verdict.", FIRST_TOKEN_BUCKETS_S
        )
        self._between = seconds(
            "inter_verdict_latency", "Between two verdicts of a session.", LATENCY_BUCKETS_S
        )
        self._handling = seconds(
            "draft_handling", "From a Draft's arrival to the engine.", HANDLING_BUCKETS_S
        )

    def frame_received(self, num_bytes: int) -> None:
        self._frames_received.inc()
        self._bytes_received.inc(num_bytes)

    def draft_handled(self, elapsed_s: float) -> None:
        """A Draft was decoded, checked and handed to the engine."""
        self._handling.observe(elapsed_s)

    def frame_sent(self, num_bytes: int) -> None:
        self._frames_sent.inc()
        self._bytes_sent.inc(num_bytes)

    def opened(self, opened: Opened) -> None:
        # Prompt and committed output were prefilled, up to the first position.
        self._prompt_tokens.inc(opened.first_position)
        self._prefix_queries.inc(opened.first_position)
        self._prefix_hits.inc(opened.cached_prompt_tokens)

    def verdict(self, verdict: Verdict, num_recovered: int) -> None:
        """`num_recovered` tokens were committed by the edge since the last verdict."""
        num_accepted = verdict.num_accepted
        self._generation_tokens.inc(num_recovered + num_accepted + len(verdict.token_ids))
        self._compute.observe(verdict.compute_us * 1e-6)
        if not verdict.num_draft_tokens:
            return
        self._queue.observe(verdict.queue_us * 1e-6)
        self._num_drafts.inc()
        self._num_draft_tokens.inc(verdict.num_draft_tokens)
        self._num_accepted_tokens.inc(num_accepted)
        for counter in self._accepted_per_pos[:num_accepted]:
            counter.inc()
        # A stop inside the drafts leaves the rest unjudged: no rollback.
        if num_accepted < verdict.num_draft_tokens and verdict.finish_reason is None:
            self._rollbacks.inc()

    def first_token(self, elapsed_s: float) -> None:
        self._first_token.observe(elapsed_s)

    def between_verdicts(self, elapsed_s: float) -> None:
        self._between.observe(elapsed_s)

    def session_started(self) -> None:
        self._active.inc()

    def session_ended(self, outcome: str, stale_tokens: int) -> None:
        """`stale_tokens` are those that never reached the engine; it counts its own."""
        self._active.dec()
        self._stale_tokens.inc(stale_tokens)
        self._outcomes.labels(outcome).inc()

    def session_refused(self, outcome: str) -> None:
        """It never started: no room, or the server is shutting down."""
        self._outcomes.labels(outcome).inc()

    def no_room(self, reason: Refusal) -> None:
        self._no_room.labels(reason.value).inc()

    def room(self, room: KVRoom) -> None:
        """Take over where admission stands."""
        self._queued.set(room.num_waiting)
        self._kv_tokens.set(room.num_tokens)
        self._kv_tokens_reserved.set(room.reserved_tokens)

    def protocol_error(self, field: str) -> None:
        # Field names are ours, never the peer's, so their number is bounded.
        self._protocol_errors.labels(field or "unknown").inc()

    def asyncio_tasks(self, num_tasks: int) -> None:
        self._tasks.set(num_tasks)

    def engine(self, stats: EngineStats, healthy: bool) -> None:
        """Take over a snapshot of the engine; its totals only grow."""
        last, self._last_stats = self._last_stats, stats
        self._running.set(stats.running_sessions)
        self._waiting.set(stats.waiting_sessions)
        self._held.set(stats.held_sessions)
        self._kv_usage.set(stats.kv_cache_usage)
        self._healthy.set(healthy)
        self._evicted.inc(max(0, stats.evicted_sessions - last.evicted_sessions))
        self._preemptions.inc(max(0, stats.preempted_sessions - last.preempted_sessions))
        self._stale_tokens.inc(max(0, stats.stale_tokens - last.stale_tokens))
        self._forwarded_tokens.inc(max(0, stats.forwarded_tokens - last.forwarded_tokens))

    def _vllm(self, kind: Any, name: str, text: str) -> Any:
        metric = kind(f"vllm:{name}", text, list(self._vllm_labels), registry=self.registry)
        return metric.labels(*self._vllm_labels.values())

    def _own(self, kind: Any, name: str, text: str, labels: list[str] | None = None) -> Any:
        return kind(f"picospec_cloud_{name}", text, labels or (), registry=self.registry)


class MetricsServer:
    """Serves a registry over HTTP, in a thread of its own; off the event loop."""

    def __init__(self, config: MetricsConfig, metrics: CloudMetrics) -> None:
        self._server: WSGIServer | None = None
        self.port = 0
        if config.enabled:
            self._server, self._thread = start_http_server(
                config.port, config.host, registry=metrics.registry
            )
            self.port = self._server.server_port

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
