"""What operators see of a generation: logs and metrics of both daemons."""

from __future__ import annotations

import openai
import pytest

from tests.support.chat import speculation_of, usage_of, user_says
from tests.support.daemons import API_KEY, CLOUD_TOKEN, Cloud, Daemons, Edge, until

QUESTION = user_says("What is a lighthouse for?")

# Counters and histograms that one generation moves, in each daemon.
EDGE_MOVES = (
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "picospec_edge_time_to_first_token_seconds_count",
    "picospec_edge_inter_token_latency_seconds_count",
    "picospec_edge_request_seconds_count",
    "picospec_edge_round_trip_seconds_count",
    "picospec_edge_verdict_queue_seconds_count",
    "picospec_edge_verdict_compute_seconds_sum",
    "picospec_edge_bytes_up_total",
    "picospec_edge_bytes_down_total",
    "picospec_edge_rollbacks_total",
    "picospec_edge_drafted_tokens_total",
    "picospec_edge_generations_total",
    "picospec_edge_requests_total",
)
EDGE_STANDS = (
    "picospec_edge_stale_tokens_total",
    "picospec_edge_resumes_total",
    "picospec_edge_active_generations",
    "picospec_edge_cloud_reachable",
    "picospec_edge_drafter_alive",
    "picospec_edge_drafter_contexts",
    "picospec_edge_drafter_restarts_total",
    "picospec_edge_open_streams",
    "picospec_edge_asyncio_tasks",
)
CLOUD_MOVES = (
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "picospec_cloud_time_to_first_token_seconds_count",
    "picospec_cloud_inter_verdict_latency_seconds_count",
    "picospec_cloud_verdict_queue_seconds_count",
    "picospec_cloud_verdict_compute_seconds_sum",
    "picospec_cloud_draft_handling_seconds_count",
    "picospec_cloud_received_bytes_total",
    "picospec_cloud_sent_bytes_total",
    "picospec_cloud_frames_received_total",
    "picospec_cloud_frames_sent_total",
    "picospec_cloud_rollbacks_total",
    "picospec_cloud_sessions_total",
)
CLOUD_STANDS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_hits_total",
    "picospec_cloud_stale_draft_tokens_total",
    "picospec_cloud_sessions_active",
    "picospec_cloud_sessions_held",
    "picospec_cloud_sessions_evicted_total",
    "picospec_cloud_engine_healthy",
    "picospec_cloud_asyncio_tasks",
)


async def test_metrics_of_both_daemons_move_with_a_generation(cloud: Cloud, edge: Edge) -> None:
    before = edge.metrics(), cloud.metrics()
    async with edge.client() as client:
        completion = await client.chat.completions.create(
            model=edge.model, messages=QUESTION, temperature=0, max_tokens=32
        )
    num_sessions = before[1]("picospec_cloud_sessions_total") + 1
    until(lambda: cloud.metrics()("picospec_cloud_sessions_total") == num_sessions)
    for was, now, moves, stands in (
        (before[0], edge.metrics(), EDGE_MOVES, EDGE_STANDS),
        (before[1], cloud.metrics(), CLOUD_MOVES, CLOUD_STANDS),
    ):
        assert set(stands) <= now.names
        moved = {name for name in moves if now(name) > was(name)}
        assert moved == set(moves)
    edge_now, cloud_now = edge.metrics(), cloud.metrics()
    usage, speculation = usage_of(completion), speculation_of(completion)
    for name, value in (
        ("vllm:spec_decode_num_draft_tokens_total", speculation["drafted_tokens"]),
        ("vllm:spec_decode_num_accepted_tokens_total", speculation["accepted_tokens"]),
    ):
        assert edge_now(name) - before[0](name) == value
        assert cloud_now(name) - before[1](name) == value
    generated = "vllm:generation_tokens_total"
    assert cloud_now(generated) - before[1](generated) == usage.completion_tokens
    assert edge_now("picospec_edge_cloud_reachable") == 1
    assert cloud_now("picospec_cloud_engine_healthy") == 1


async def test_a_request_id_follows_a_generation_through_both_logs(
    cloud: Cloud, edge: Edge
) -> None:
    request_id = f"follow-me-{edge.daemon.name}"
    async with edge.client() as client:
        response = await client.chat.completions.with_raw_response.create(
            model=edge.model, messages=QUESTION, max_tokens=4,
            extra_headers={"X-Request-Id": request_id},
        )  # fmt: skip
    assert response.headers["X-Request-Id"] == request_id
    assert response.parse().id.endswith(request_id)

    def messages(log: list[dict[str, str]]) -> list[str]:
        return [entry["message"] for entry in log if entry.get("request_id") == request_id]

    until(lambda: "generation ended" in messages(cloud.daemon.records()))
    assert messages(cloud.daemon.records()) == ["generation opened", "generation ended"]
    assert messages(edge.daemon.records()) == ["generation ended", "POST /v1/chat/completions"]


async def test_no_secret_is_in_any_log(
    daemons: Daemons, cloud: Cloud, edges: dict[str, Edge]
) -> None:
    wrong_key = "a-wrong-key-that-no-log-may-show"
    for edge in edges.values():
        async with edge.client(api_key=wrong_key) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
    for log in daemons.folder.glob("*.log"):
        text = log.read_text(errors="replace")
        assert "***" in text, "the configuration is shown with its secrets blanked"
        for secret in (API_KEY, CLOUD_TOKEN, wrong_key):
            assert secret not in text, log
