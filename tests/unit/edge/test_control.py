"""Draft length and window control, alone and in closed loop with the event simulation."""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import statistics
from typing import cast

import pytest

from edge_agent import control, estimates
from edge_agent.control import (
    CHANGE_INTERVAL_S,
    AdaptiveLength,
    FixedLength,
)
from edge_agent.estimates import LiveEstimates, VerifyCostEstimate
from picospec.performance.controller import DraftLengthController, DraftPlan
from picospec.performance.costs import Costs, Network, Scheme, VerifyCost
from picospec.performance.prediction import predicted_goodput
from picospec.performance.simulation import Simulation
from picospec.protocol.messages import VerificationMode

SPLIT, COUPLED = VerificationMode.SPLIT, VerificationMode.COUPLED
VERIFY = VerifyCost.affine(45.5, 4.2, plain_ms=40.0)
DRAFTERS = {0.69: 7.5, 0.965: 13.2}  # ms per token, by acceptance
INITIAL = DraftPlan(4, 16)


def costs_of(alpha: float) -> Costs:
    return Costs(DRAFTERS[alpha], VERIFY, row_judge_ms=0.3, recover_ms=0.7)


class Recorder:
    """Passes everything on, and keeps the plans in force: (seconds, plan)."""

    def __init__(self, controller: DraftLengthController) -> None:
        self._controller = controller
        self.plans: list[tuple[float, DraftPlan]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._controller, name)

    def plan(self, now: float) -> DraftPlan:
        plan = self._controller.plan(now)
        if not self.plans or self.plans[-1][1] != plan:
            self.plans.append((now, plan))
        return plan


def closed_loop(
    scheme: Scheme, costs: Costs, link: Network, alpha: float, seed: int = 5
) -> tuple[Simulation, Recorder]:
    recorder = Recorder(AdaptiveLength(INITIAL, scheme))
    controller = cast(DraftLengthController, recorder)
    return Simulation(costs, scheme, link, alpha, seed, controller), recorder


def goodput(scheme: Scheme, costs: Costs, link: Network, alpha: float, plan: DraftPlan) -> float:
    """Expected, tokens per second."""
    scheme = dataclasses.replace(scheme, draft_length=plan.draft_length, window=plan.window)
    return predicted_goodput(costs, scheme, link, alpha)


def best_fixed(scheme: Scheme, costs: Costs, link: Network, alpha: float) -> float:
    return max(goodput(scheme, costs, link, alpha, DraftPlan(n, 64)) for n in range(1, 9))


def test_worked_examples() -> None:
    for module in (control, estimates):
        assert not doctest.testmod(module).failed


def test_a_fixed_plan_stays() -> None:
    controller = FixedLength(INITIAL)
    controller.drafted(1, 0.01)
    controller.judged(4, 0, 1, 0.0, 9.0)
    controller.round_trip(3.0)
    assert controller.plan(0.0) == controller.plan(100.0) == INITIAL


@pytest.mark.parametrize("rtt_ms", [0.0, 20.0, 50.0, 100.0, 200.0])
@pytest.mark.parametrize("alpha", [0.69, 0.965])
@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(mode=COUPLED), Scheme(fast_verify=False)], ids=str
)
def test_finds_the_best_length_and_stays(scheme: Scheme, alpha: float, rtt_ms: float) -> None:
    costs, link = costs_of(alpha), Network(rtt_ms)
    simulation, recorder = closed_loop(scheme, costs, link, alpha)
    simulation.run(until_ms=5e3)
    early = simulation.num_tokens
    simulation.run(until_ms=65e3)
    best = best_fixed(scheme, costs, link, alpha)
    # What its plans are worth, without the luck of the run ...
    until = [time for time, _ in recorder.plans[1:]] + [65.0]
    worth = sum(
        (end - max(begin, 5.0)) * goodput(scheme, costs, link, alpha, plan)
        for (begin, plan), end in zip(recorder.plans, until, strict=True)
        if end > 5.0
    )
    assert worth / 60.0 >= 0.95 * best
    # ... and what the run brought, with it.
    assert (simulation.num_tokens - early) / 60.0 >= 0.88 * best
    changes = [time for time, _ in recorder.plans]
    assert sum(time > 5.0 for time in changes) <= 4
    assert all(b - a >= CHANGE_INTERVAL_S for a, b in itertools.pairwise(changes))


@pytest.mark.parametrize("alpha", [0.69, 0.965])
@pytest.mark.parametrize(("before_ms", "after_ms"), [(0.0, 200.0), (200.0, 0.0), (20.0, 500.0)])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(parallel_draft=False, fast_verify=False)])
def test_follows_a_step_of_the_round_trip(
    scheme: Scheme, before_ms: float, after_ms: float, alpha: float
) -> None:
    costs = costs_of(alpha)
    simulation, recorder = closed_loop(scheme, costs, Network(before_ms), alpha)
    simulation.run(until_ms=20e3)
    simulation.world.link = Network(after_ms)
    simulation.run(until_ms=25e3)
    plan = recorder.plans[-1][1]
    best = best_fixed(scheme, costs, Network(after_ms), alpha)
    assert goodput(scheme, costs, Network(after_ms), alpha, plan) >= 0.93 * best
    simulation.run(until_ms=60e3)
    plan = recorder.plans[-1][1]
    assert goodput(scheme, costs, Network(after_ms), alpha, plan) >= 0.95 * best


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(mode=COUPLED)], ids=str)
def test_a_loaded_engine_shortens_the_draft(scheme: Scheme) -> None:
    """A full batch is compute-bound: each further draft costs as much as the first token. Whether
    steps differ enough to tell is luck, so several runs."""
    alpha, link = 0.69, Network(20.0)
    idle = costs_of(alpha)
    loaded = dataclasses.replace(idle, verify_ms=VerifyCost.affine(60.0, 40.0))
    best = best_fixed(scheme, loaded, link, alpha)
    shares = []
    for seed in range(5):
        simulation, recorder = closed_loop(scheme, idle, link, alpha, seed)
        simulation.run(until_ms=10e3)
        before = recorder.plans[-1][1].draft_length
        simulation.world.costs = loaded
        simulation.run(until_ms=18e3)
        plan = recorder.plans[-1][1]
        assert plan.draft_length < before
        shares.append(goodput(scheme, loaded, link, alpha, plan) / best)
    assert min(shares) >= 0.88
    assert statistics.median(shares) >= 0.95


def test_a_long_link_gets_a_wide_window_and_a_short_one_a_narrow() -> None:
    simulation, recorder = closed_loop(Scheme(), costs_of(0.965), Network(200.0), 0.965)
    simulation.run(until_ms=20e3)
    wide = recorder.plans[-1][1].window
    assert wide > INITIAL.window
    simulation.world.link = Network(0.0)
    simulation.run(until_ms=60e3)
    assert recorder.plans[-1][1].window < wide


def test_same_history_same_plans() -> None:
    plans = []
    for _ in range(2):
        simulation, recorder = closed_loop(Scheme(), costs_of(0.69), Network(30.0), 0.69)
        simulation.run(until_ms=20e3)
        plans.append(recorder.plans)
    assert plans[0] == plans[1]


def test_keeps_the_initial_plan_until_it_knows_enough() -> None:
    controller = AdaptiveLength(DraftPlan(12, 100), Scheme())
    capped = DraftPlan(8, 64)
    assert controller.plan(0.0) == capped
    controller.drafted(1, 0.01)
    controller.judged(0, 0, 1, 0.0, 0.1)  # judged nothing: says nothing
    assert controller.plan(1.0) == capped
    controller.judged(8, 0, 1, 0.0, 0.0)  # the row's: no step was seen yet
    controller.round_trip(0.05)
    assert controller.plan(2.0) == capped
    controller.judged(8, 1, 1, 0.0, 0.08)
    probe = controller.plan(3.0)
    assert probe.draft_length < capped.draft_length  # steps must differ to be understood


def test_a_new_chat_starts_with_what_the_edge_knows() -> None:
    shared = LiveEstimates()
    scheme, costs, link = (
        Scheme(parallel_draft=False, fast_verify=False),
        costs_of(0.965),
        Network(200),
    )
    first = AdaptiveLength(DraftPlan(1, 4), scheme, shared)
    simulation = Simulation(costs, scheme, link, 0.965, 1, first)
    simulation.run(until_ms=10e3)
    learnt = first.plan(10.0)
    assert learnt.draft_length == 8
    for silence_s in (0.0, 3600.0):
        second = AdaptiveLength(DraftPlan(1, 4), scheme, shared)
        assert second.plan(10.0 + silence_s).draft_length == 8


# -- estimates -------------------------------------------------------------------------------


def test_the_verify_cost_is_learnt() -> None:
    estimate = VerifyCostEstimate()
    for _ in range(50):
        for num_drafts in (1, 3, 6):
            estimate.add(num_drafts, 45.0 + 4.0 * num_drafts)
    estimate.add(0, 40.0)
    cost = estimate.cost()
    assert cost(2) == pytest.approx(53.0, rel=0.02)
    assert cost(8) == pytest.approx(77.0, rel=0.02)
    assert cost(0) == 40.0


def test_an_unseen_slope_is_taken_for_small() -> None:
    estimate = VerifyCostEstimate()
    for _ in range(20):
        estimate.add(4, 124.0)
    assert estimate.is_doubtful
    cost = estimate.cost()
    assert cost(4) == pytest.approx(124.0)
    assert cost(5) - cost(4) == pytest.approx(6.0)
    only_plain = VerifyCostEstimate()
    only_plain.add(0, 40.0)
    assert only_plain.cost()(0) == pytest.approx(40.0)


def test_a_slope_is_remembered_until_the_load_changes() -> None:
    estimate = VerifyCostEstimate()
    for _ in range(20):
        estimate.add(1, 60.0)
        estimate.add(4, 90.0)
    assert not estimate.is_doubtful
    estimate.decay(1e-9)
    estimate.add(4, 90.0)
    assert not estimate.is_doubtful
    assert estimate.cost()(1) == pytest.approx(60.0)
    estimate.decay(1e-9)
    estimate.add(4, 180.0)
    assert estimate.is_doubtful


def test_plain_steps_alone_tell_that_load_has_gone() -> None:
    estimate = VerifyCostEstimate()
    for num_drafts in (1, 2, 3, 4) * 5:
        estimate.add(num_drafts, 150.0 + 50.0 * num_drafts)
    estimate.decay(1e-6)
    for _ in range(10):
        estimate.add(0, 40.0)
    assert estimate.cost()(3) == pytest.approx(40.0 * 2.0)


def test_a_falling_cost_is_not_believed() -> None:
    estimate = VerifyCostEstimate()
    for _ in range(50):
        estimate.add(1, 100.0)
        estimate.add(5, 50.0)
    cost = estimate.cost()
    assert cost(8) == pytest.approx(cost(1)) == pytest.approx(75.0)


def test_acceptance_by_place() -> None:
    live = LiveEstimates()
    for _ in range(400):
        live.judged(0, 4, 2)  # the third is always rejected, the fourth never judged
        live.judged(0, 2, 2)
    first, second, third, fourth, *_ = live.acceptance()
    assert first > 0.95
    assert second > 0.95
    assert third < 0.1
    assert fourth == pytest.approx(0.8, abs=0.01)  # unseen: the mean of all
    live.judged(100, 3, 3)  # far beyond the last place kept


def test_round_trips_are_forgotten_in_seconds_but_not_in_silence() -> None:
    live = LiveEstimates()
    live.age(0.0)
    for _ in range(20):
        live.round_trip(0.2)
    live.age(1e6)
    assert live.link().rtt_ms == pytest.approx(200.0)
    for step in range(50):
        live.round_trip(0.01)
        live.age(1e6 + 0.1 * step)
    assert live.link().rtt_ms < 30.0
    live.age(0.0)  # a clock that falls ages nothing
    assert live.link().rtt_ms < 30.0


def test_a_text_that_ends_with_a_row_teaches_nothing_about_steps() -> None:
    """Its last draft is accepted without a forward, in no time."""
    controller = AdaptiveLength(INITIAL, Scheme())
    for now in range(20):
        controller.drafted(1, 0.01)
        controller.round_trip(0.02)
        controller.judged(1, 1, 0, 0.0, 0.0)
        controller.plan(float(now))
    controller.judged(5, 5, 1, 0.0, 0.05)
    assert controller.plan(30.0).draft_length >= 1
