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
        flow.arrived(0, position, 1, (position + 1 - num_drafts) * interval_s)
    return flow


def test_a_draft_is_due_one_interval_after_the_last() -> None:
    flow = flowing(0.008)
    assert flow.due_s(30) == pytest.approx(0.008)
    assert flow.due_s(32) == pytest.approx(0.024)


def test_nothing_is_expected_of_an_edge_that_has_never_drafted() -> None:
    assert math.isinf(DraftFlow().due_s(5))


def test_after_a_miss_the_round_trip_passes() -> None:
    flow = flowing(0.008)
    for epoch in range(1, 30):
        made_s = float(epoch)
        flow.told(40 + epoch, broken=True, alone=False, now=made_s)
        flow.arrived(epoch, 40 + epoch, 1, made_s + 0.050)
    flow.told(80, broken=True, alone=False, now=100.0)
    assert flow.due_s(80) == pytest.approx(100.050, abs=0.001)


def test_a_frame_that_comes_too_late_tells_when_the_next_may_come() -> None:
    """Split: the cloud went on alone, and every chain was contradicted before it arrived."""
    flow = DraftFlow(survives=False)
    for step in range(20):
        made_s = 0.02 * step
        flow.told(10 + step, broken=False, alone=True, now=made_s)
        flow.arrived(step, 10 + step, 1, made_s + 0.012)
    flow.told(30, broken=False, alone=True, now=1.0)
    assert flow.due_s(30) == pytest.approx(1.012, abs=0.001)


def test_a_chain_that_agrees_with_the_cloud_goes_on() -> None:
    flow = flowing(0.008)
    flow.told(29, broken=False, alone=True, now=0.001)
    assert flow.due_s(30) == pytest.approx(0.008)
    flow.broke()
    assert math.isinf(flow.due_s(30))  # how long a restart takes is not known yet


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
    flow.arrived(0, 30, 1, 0.030)
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
