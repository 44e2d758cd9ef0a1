"""When the cloud waits for drafts, and when it goes on alone."""

from __future__ import annotations

import math

import pytest

from cloud_server.engine.takeover import DraftFlow, DraftWait, Tempo

PLAIN = {"rate": 47.0, "draft_s": 0.001}  # tokens per second without drafts


def flowing(interval_s: float, acceptance: float = 0.9, num_drafts: int = 30) -> DraftFlow:
    """Drafts for positions from 0 on came one every `interval_s`, the last at 0."""
    flow = DraftFlow(acceptance=acceptance)
    for position in range(num_drafts):
        flow.arrived(position, 1, (position + 1 - num_drafts) * interval_s)
    return flow


def test_a_draft_is_due_one_interval_after_the_last() -> None:
    flow = flowing(0.008)
    assert flow.due_s(30) == pytest.approx(0.008)
    assert flow.due_s(32) == pytest.approx(0.024)


def test_nothing_is_expected_of_an_edge_that_has_never_drafted() -> None:
    assert math.isinf(DraftFlow().due_s(5))


def test_after_a_miss_the_round_trip_passes() -> None:
    flow = flowing(0.008)
    for miss in range(30):
        start_s = float(miss)
        flow.broke(40, start_s)
        flow.arrived(40, 1, start_s + 0.050)
        flow.arrived(41, 1, start_s + 0.058)
    flow.broke(50, 100.0)
    assert flow.due_s(50) == pytest.approx(100.050, abs=0.001)
    assert flow.due_s(52) == pytest.approx(100.066, abs=0.002)


def test_acceptance_follows_the_verdicts() -> None:
    flow = DraftFlow()
    for _ in range(100):
        flow.judged(3, 3)
    assert flow.acceptance > 0.95
    for _ in range(100):
        flow.judged(1, 0)
    assert flow.acceptance < 0.05


def test_the_engine_waits_for_a_good_draft_that_is_about_to_come() -> None:
    wait = DraftWait()
    wait.decide([(flowing(0.008), 30)], now=0.0, **PLAIN)
    assert 0.008 < wait.until_s < 0.020


@pytest.mark.parametrize(
    "flow",
    [
        flowing(0.200),  # too late
        flowing(0.008, acceptance=0.2),  # too bad
        DraftFlow(),  # unknown
    ],
    ids=["late", "bad", "unknown"],
)
def test_the_engine_goes_on_alone_otherwise(flow: DraftFlow) -> None:
    wait = DraftWait()
    wait.decide([(flow, 30)], now=0.0, **PLAIN)
    assert wait.until_s == 0.0


def test_many_sessions_wait_for_one_draft_only_if_it_is_worth_their_tokens() -> None:
    wait = DraftWait()
    flows = [(flowing(0.008), 30), *((DraftFlow(), 30) for _ in range(7))]
    wait.decide(flows, rate=150.0, draft_s=0.004, now=0.0)
    assert wait.until_s == 0.0
    wait.decide([(flowing(0.008), 30) for _ in range(8)], rate=150.0, draft_s=0.004, now=0.0)
    assert wait.until_s > 0.0


def test_a_draft_that_does_not_come_is_not_waited_for_again() -> None:
    flow, wait = flowing(0.008), DraftWait()
    wait.decide([(flow, 30)], now=0.0, **PLAIN)
    wait.expired()
    wait.decide([(flow, 30)], now=0.020, **PLAIN)
    assert wait.until_s == 0.0
    flow.arrived(30, 1, 0.030)
    wait.decide([(flow, 31)], now=0.031, **PLAIN)
    assert wait.until_s > 0.0


def test_a_wait_that_ends_well_changes_nothing() -> None:
    flow, wait = flowing(0.008), DraftWait()
    wait.decide([(flow, 30)], now=0.0, **PLAIN)
    wait.clear()
    assert wait.until_s == 0.0
    assert math.isfinite(flow.due_s(30))


def test_tempo_is_of_late() -> None:
    tempo = Tempo()
    assert tempo.per_second == 0.0
    for _ in range(100):
        tempo.add(1, 0.02)
    assert tempo.per_second == pytest.approx(50.0)
    for _ in range(100):
        tempo.add(2, 0.02)
    assert tempo.per_second > 85.0
