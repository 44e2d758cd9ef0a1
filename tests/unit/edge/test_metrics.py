from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_agent.metrics import DrafterState, EdgeMetrics
from edge_agent.observer import PipelineObserver
from picospec.protocol.messages import Verdict


def samples(metrics: EdgeMetrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_verdicts_count_under_vllms_names() -> None:
    metrics = EdgeMetrics()
    metrics.verdict(Verdict(0, 5, num_accepted=2, num_draft_tokens=4, queue_us=1500))
    metrics.verdict(Verdict(0, 7, num_accepted=1, num_draft_tokens=1, compute_us=40_000))
    metrics.verdict(Verdict(0, 8, token_ids=(3,)))  # no drafts: not a draft in vLLM's sense
    found = samples(metrics)
    assert found["vllm:spec_decode_num_drafts_total"] == 2
    assert found["vllm:spec_decode_num_draft_tokens_total"] == 5
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == 3
    per_pos = "vllm:spec_decode_num_accepted_tokens_per_pos_total{position=%d}"
    assert [found.get(per_pos % position) for position in range(3)] == [2, 1, None]
    assert found["picospec_edge_verdict_queue_seconds_sum"] == 0.0015
    assert found["picospec_edge_verdict_compute_seconds_sum"] == 0.04


def test_the_names_are_vllms() -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.origin).parent / "v1/spec_decode/metrics.py").read_text()
    for name in samples(EdgeMetrics()):
        if name.startswith("vllm:"):
            assert f'"{name.removesuffix("_total").removesuffix("_created")}"' in source


def test_tokens_that_come_together_share_their_latency() -> None:
    metrics = EdgeMetrics()
    metrics.inter_token(0.12, 4)
    found = samples(metrics)
    assert found["picospec_edge_inter_token_latency_seconds_count"] == 4
    assert round(found["picospec_edge_inter_token_latency_seconds_sum"], 6) == 0.12


def test_generations_and_the_drafter() -> None:
    state = DrafterState(alive=True, restarts=2, open_contexts=1)
    metrics = EdgeMetrics(lambda: state)
    observed: PipelineObserver = metrics  # mypy: every method is there
    observed.generation_started()
    metrics.generation_started()
    metrics.generation_finished("stop")
    metrics.rollback()
    metrics.stale(3)
    metrics.drafted(7)
    metrics.resumed()
    metrics.bytes_up(10)
    metrics.bytes_down(20)
    metrics.round_trip(0.02)
    metrics.request_finished("completions", "stop", 1.0)
    found = samples(metrics)
    assert found["picospec_edge_active_generations"] == 1
    assert found["picospec_edge_generations_total{outcome=stop}"] == 1
    assert found["picospec_edge_rollbacks_total"] == 1
    assert found["picospec_edge_stale_tokens_total"] == 3
    assert found["picospec_edge_drafted_tokens_total"] == 7
    assert found["picospec_edge_resumes_total"] == 1
    assert found["picospec_edge_bytes_up_total"] == 10
    assert found["picospec_edge_bytes_down_total"] == 20
    assert found["picospec_edge_round_trip_seconds_count"] == 1
    assert found["picospec_edge_drafter_alive"] == 1
    assert found["picospec_edge_drafter_restarts_total"] == 2


def test_two_agents_in_a_process_do_not_share_counts() -> None:
    first, second = EdgeMetrics(), EdgeMetrics()
    first.rollback()
    assert samples(second)["picospec_edge_rollbacks_total"] == 0


async def test_what_the_event_loop_holds() -> None:
    metrics = EdgeMetrics(open_streams=lambda: 3)
    found = samples(metrics)
    assert found["picospec_edge_open_streams"] == 3
    assert found["picospec_edge_asyncio_tasks"] == 1
