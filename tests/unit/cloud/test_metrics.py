"""What the cloud server counts."""

from __future__ import annotations

import asyncio
import urllib.request

from cloud_server.config import MetricsConfig
from cloud_server.engine.interface import EngineStats
from cloud_server.engine.scripted import SCRIPTED_CARD
from cloud_server.metrics import CloudMetrics
from picospec.protocol.messages import FinishReason, Opened, Verdict
from tests.support.cloud import an_open, running_cloud

LABELS = {"model_name": "scripted", "engine": "0"}


def value(metrics: CloudMetrics, name: str, **labels: str) -> float | None:
    known = LABELS if name.startswith("vllm:") else {}
    return metrics.registry.get_sample_value(name, known | labels)


def test_verdicts_are_counted_as_vllm_does() -> None:
    metrics = CloudMetrics(SCRIPTED_CARD)
    metrics.opened(
        Opened(
            first_position=10, cached_prompt_tokens=6, max_draft_tokens=16, window=64, sparse_k=64
        )
    )
    metrics.verdict(Verdict(0, 10, token_ids=(1,)), num_recovered=0)  # no drafts
    metrics.verdict(
        Verdict(epoch=0, position=11, num_accepted=2, token_ids=(9,), num_draft_tokens=4),
        num_recovered=0,
    )
    metrics.verdict(
        Verdict(epoch=1, position=15, num_accepted=1, num_draft_tokens=1), num_recovered=1
    )
    last = Verdict(
        epoch=1, position=16, num_accepted=1, num_draft_tokens=3, finish_reason=FinishReason.STOP
    )
    metrics.verdict(last, num_recovered=0)

    assert value(metrics, "vllm:spec_decode_num_drafts_total") == 3
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 8
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 4
    per_pos = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [value(metrics, per_pos, position=str(p)) for p in range(3)] == [3, 1, 0]
    assert value(metrics, "vllm:generation_tokens_total") == 1 + 3 + 2 + 1
    assert value(metrics, "vllm:prompt_tokens_total") == 10
    assert value(metrics, "vllm:prefix_cache_hits_total") == 6
    # The stop left drafts unjudged; that is not a rejection.
    assert value(metrics, "picospec_cloud_rollbacks_total") == 1


def test_the_engines_totals_become_counters() -> None:
    metrics = CloudMetrics(SCRIPTED_CARD)
    metrics.engine(EngineStats(1, 2, 3, 0.5, 4, 5, 6), healthy=True)
    metrics.engine(EngineStats(2, 3, 4, 0.25, 5, 7, 9), healthy=False)
    assert value(metrics, "vllm:num_requests_running") == 2
    assert value(metrics, "vllm:num_requests_waiting") == 4
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25
    assert value(metrics, "vllm:num_preemptions_total") == 7
    assert value(metrics, "picospec_cloud_sessions_held") == 3
    assert value(metrics, "picospec_cloud_sessions_evicted_total") == 5
    assert value(metrics, "picospec_cloud_stale_draft_tokens_total") == 9
    assert value(metrics, "picospec_cloud_engine_healthy") == 0


def test_two_servers_in_a_process_share_nothing() -> None:
    first, second = CloudMetrics(SCRIPTED_CARD), CloudMetrics(SCRIPTED_CARD)
    first.session_started()
    assert value(second, "picospec_cloud_sessions_active") == 0


async def test_prometheus_can_scrape_them() -> None:
    async with running_cloud(metrics=MetricsConfig(port=0)) as cloud:
        stream = cloud.stream()
        await stream.start(an_open(session_id="scrape-me-not"))
        url = f"http://127.0.0.1:{cloud.server.metrics_server.port}/metrics"

        def scrape() -> str:
            with urllib.request.urlopen(url, timeout=5) as response:
                return str(response.read(), "utf-8")

        text = await asyncio.to_thread(scrape)
    for name in (
        'vllm:spec_decode_num_drafts_total{engine="0",model_name="scripted"}',
        "picospec_cloud_sessions_active 1.0",
        'picospec_cloud_verdict_compute_seconds_bucket{le="0.0005"}',
        "picospec_cloud_verdict_compute_seconds_count 1.0",
        "picospec_cloud_time_to_first_token_seconds_count 1.0",
        "picospec_cloud_received_bytes_total",
        "picospec_cloud_asyncio_tasks",
    ):
        assert name in text
    assert "scrape-me-not" not in text
