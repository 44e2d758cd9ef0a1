"""The closed forms: against hand-computed values, the paper's limits, and each other."""

from __future__ import annotations

import dataclasses
import doctest
import math
import time

import pytest

from picospec.errors import ConfigError
from picospec.performance import chain, costs, prediction
from picospec.performance.costs import (
    Costs,
    Network,
    Scheme,
    VerifyCost,
    costs_from_json,
    dense_rejection_bytes,
)
from picospec.performance.prediction import (
    best_draft_length,
    break_even_rtt_ms,
    cloud_only,
    paper_model,
    predicted_goodput,
)
from picospec.protocol.messages import VerificationMode
from tests.support.builders import COUPLED

COSTS = Costs(draft_ms=10.0, verify_ms=VerifyCost.affine(46.0, 4.0, plain_ms=40.0))
VANILLA = Scheme(2, 2, parallel_draft=False, fast_verify=False, kept_rows=False)


@pytest.mark.parametrize("module", [costs, chain, prediction])
def test_worked_examples(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed


# -- the paper's model -----------------------------------------------------------------------


def test_the_papers_quantities() -> None:
    model = paper_model(100.0, 80.0, 60.0, alpha=0.5, draft_length=2, pre_verify_ms=15.0)
    assert model.sync_ms == 240.0
    assert model.async_ms == 140.0
    assert model.bubble_ms == 25.0
    assert model.tokens_per_round == 1.5
    assert model.round_ms == 0.25 * 140.0 + 0.75 * 240.0
    assert model.tokens_per_s == pytest.approx(1500.0 / 215.0)


@pytest.mark.parametrize("rtt_ms", [0.0, 10.0, 40.0])
def test_the_papers_limits(rtt_ms: float) -> None:
    sure = paper_model(120.0, 60.0, rtt_ms, alpha=1.0 - 1e-9, draft_length=4)
    assert sure.speedup == pytest.approx(1.0 + (rtt_ms + 60.0) / 120.0)
    assert paper_model(120.0, 60.0, rtt_ms, alpha=1.0, draft_length=4).tokens_per_round == 4.0
    hopeless = paper_model(120.0, 60.0, rtt_ms, alpha=0.0, draft_length=4)
    assert hopeless.speedup == 1.0
    assert hopeless.tokens_per_round == 1.0


def test_the_scheme_has_the_papers_limits_too() -> None:
    """Parallel drafting over a synchronous scheme, T_d = 80 > RTT + T_v, rounds of 4."""
    costs = Costs(20.0, VerifyCost.affine(30.0, 2.0))
    parallel = Scheme(4, 16, fast_verify=False, kept_rows=False)
    vanilla = dataclasses.replace(parallel, parallel_draft=False)
    link = Network(rtt_ms=30.0)
    sure = predicted_goodput(costs, parallel, link, 1.0) / predicted_goodput(
        costs, vanilla, link, 1.0
    )
    assert sure == pytest.approx(1.0 + (30.0 + 38.0) / 80.0, rel=0.02)
    hopeless = predicted_goodput(costs, parallel, link, 0.0) / predicted_goodput(
        costs, vanilla, link, 0.0
    )
    # The verdict finds the drafter within a token that it finishes first: up to 20 of 148 ms.
    assert 0.87 < hopeless <= 1.0


# -- ours, by hand ---------------------------------------------------------------------------


def test_vanilla_speculation_by_hand() -> None:
    """A round of two takes 20 + 20 + T_v(2) = 94 ms and brings 1 + α tokens; when both are
    accepted 2, and none is recovered."""
    link = Network(rtt_ms=20.0)
    alpha = 0.6
    expected = (1.0 - alpha) * 1 + alpha * 2
    assert predicted_goodput(COSTS, VANILLA, link, alpha) == pytest.approx(
        1e3 * expected / 94.0, rel=1e-3
    )


def test_vanilla_coupled_speculation_has_its_bonus_token() -> None:
    scheme = dataclasses.replace(VANILLA, mode=COUPLED)
    alpha = 0.6
    expected = 1 + alpha + alpha**2
    assert predicted_goodput(COSTS, scheme, Network(20.0), alpha) == pytest.approx(
        1e3 * expected / 94.0, rel=1e-3
    )


def test_pre_verification_and_the_kept_row_by_hand() -> None:
    """Nothing is accepted. The recovered token arrives at 10 and is forwarded until 50; the first
    draft, there since 20, is rejected by the row at 51; the edge hears it at 61, finishes its
    seventh draft at 70, and draws the recovered token until 72."""
    costs = dataclasses.replace(COSTS, row_judge_ms=1.0, recover_ms=2.0)
    assert predicted_goodput(costs, Scheme(4, 16), Network(20.0), 0.0) == pytest.approx(1e3 / 72.0)


def test_without_a_kept_row_the_first_draft_waits_for_its_forward() -> None:
    """Draft at 10, there at 20, judged until 20 + T_v(1) = 70, heard at 80, as a draft ends."""
    scheme = Scheme(4, 16, kept_rows=False)
    assert predicted_goodput(COSTS, scheme, Network(20.0), 0.0) == pytest.approx(1e3 / 80.0)


def test_a_sure_chain_runs_at_the_speed_of_its_slowest_part() -> None:
    slow_drafter = dataclasses.replace(COSTS, draft_ms=30.0)
    assert predicted_goodput(slow_drafter, Scheme(8, 32), Network(50.0), 1.0) == pytest.approx(
        1e3 / 30.0, rel=0.02
    )
    # The engine: the row judges one, the forward four more, T_v(4) = 62 ms for five tokens.
    assert predicted_goodput(COSTS, Scheme(4, 32), Network(50.0), 1.0) == pytest.approx(
        5e3 / 62.0, rel=0.02
    )
    # The window: four tokens each 200 ms and a little.
    assert predicted_goodput(COSTS, Scheme(4, 4), Network(200.0), 1.0) < 4e3 / 200.0


def test_acceptance_by_place() -> None:
    link = Network(20.0)
    same = predicted_goodput(COSTS, Scheme(), link, (0.7, 0.7, 0.7))
    assert same == pytest.approx(predicted_goodput(COSTS, Scheme(), link, 0.7))
    # The second draft is always rejected: two tokens a cycle, whatever comes after.
    assert predicted_goodput(COSTS, VANILLA, link, (1.0, 0.0)) == pytest.approx(2e3 / 94.0)
    assert predicted_goodput(COSTS, Scheme(), link, (0.5, 0.9)) < predicted_goodput(
        COSTS, Scheme(), link, 0.9
    )


def test_bandwidth_makes_dense_rejections_dear() -> None:
    narrow = Network(20.0, bandwidth_bps=10e6)
    dense = dataclasses.replace(narrow, rejection_bytes=dense_rejection_bytes(49_152))
    assert dense.transfer_ms(dense.rejection_bytes) == pytest.approx(157.3, rel=1e-3)
    sparse = predicted_goodput(COSTS, Scheme(), narrow, 0.7)
    assert predicted_goodput(COSTS, Scheme(), dense, 0.7) < 0.6 * sparse
    assert sparse > 0.95 * predicted_goodput(COSTS, Scheme(), Network(20.0), 0.7)
    # A coupled rejection carries no distribution at all.
    coupled = Scheme(mode=COUPLED)
    assert predicted_goodput(COSTS, coupled, dense, 0.7) == predicted_goodput(
        COSTS, coupled, narrow, 0.7
    )


@pytest.mark.parametrize("mode", list(VerificationMode))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.69, 0.965, 1.0])
def test_goodput_falls_with_the_round_trip(mode: VerificationMode, alpha: float) -> None:
    scheme = Scheme(mode=mode)
    goodputs = [
        predicted_goodput(COSTS, scheme, Network(rtt), alpha) for rtt in (0.0, 30.0, 100.0, 400.0)
    ]
    assert goodputs == sorted(goodputs, reverse=True)
    assert all(math.isfinite(goodput) and goodput > 0.0 for goodput in goodputs)


def test_a_prediction_is_fast_enough_for_the_event_loop() -> None:
    begun = time.perf_counter()
    for _ in range(20):
        predicted_goodput(COSTS, Scheme(4, 16), Network(50.0), 0.965)
    assert (time.perf_counter() - begun) / 20 < 5e-3  # some 0.2 ms; the bound is for a busy machine


# -- what follows from it --------------------------------------------------------------------


def test_cloud_only_decoding() -> None:
    assert cloud_only(COSTS) == 25.0
    assert cloud_only(dataclasses.replace(COSTS, step_overhead_ms=10.0)) == 20.0
    assert cloud_only(dataclasses.replace(COSTS, plain_ms=50.0)) == 20.0


def test_break_even() -> None:
    # Vanilla, rounds of two, both accepted: 2000 / (20 + 54 + RTT) is 25 tokens/s at RTT = 6 ms.
    assert break_even_rtt_ms(COSTS, VANILLA, 1.0) == pytest.approx(6.0, abs=0.1)
    assert break_even_rtt_ms(COSTS, VANILLA, 0.0) is None
    slow_cloud = dataclasses.replace(COSTS, plain_ms=1e5)
    assert break_even_rtt_ms(slow_cloud, Scheme(), 0.7) == math.inf
    two = break_even_rtt_ms(COSTS, Scheme(2), 0.965)
    best = break_even_rtt_ms(COSTS, Scheme(2), 0.965, draft_length_max=8)
    assert two is not None
    assert best is not None
    assert best > two


def test_best_draft_length() -> None:
    length, goodput = best_draft_length(COSTS, VANILLA, Network(0.0), 0.0)
    assert length == 1  # each further draft is in vain
    assert goodput == pytest.approx(1e3 / 60.0)
    wide = dataclasses.replace(VANILLA, window=8)
    assert best_draft_length(COSTS, wide, Network(500.0), 0.965)[0] == 8
    assert best_draft_length(COSTS, wide, Network(500.0), 0.965, draft_length_max=5)[0] == 5


# -- what goes in ----------------------------------------------------------------------------


def test_verify_cost_interpolates() -> None:
    cost = VerifyCost.measured({8: 80.0, 0: 40.0, 4: 60.0})
    assert [cost(k) for k in (0, 2, 4, 6, 8, 12)] == [40.0, 50.0, 60.0, 70.0, 80.0, 100.0]
    assert VerifyCost.measured({4: 60.0})(9) == 60.0
    assert VerifyCost.measured({1: 50.0, 2: 54.0})(0) == 50.0


@pytest.mark.parametrize("points", [{}, {-1: 3.0}, {0: 0.0}, {0: math.nan}, {1: math.inf}])
def test_impossible_verify_costs(points: dict[int, float]) -> None:
    with pytest.raises(ConfigError, match="verify_ms"):
        VerifyCost.measured(points)


def test_costs_from_json() -> None:
    document = {
        "draft_ms": 7.5,
        "verify_ms": {"0": 40, "1": 49, "4": 63.5},
        "recover_ms": 0.5,
        "plain_ms": None,
        "alpha": 0.7,
    }
    costs = costs_from_json(document)
    assert costs == Costs(
        7.5, VerifyCost(((0, 40.0), (1, 49.0), (4, 63.5))), recover_ms=0.5, plain_ms=None
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"draft_ms": None}, "draft_ms"),
        ({"draft_ms": 0}, "draft_ms"),
        ({"draft_ms": "7"}, "draft_ms"),
        ({"recover_ms": -1}, "recover_ms"),
        ({"recover_ms": True}, "recover_ms"),
        ({"verify_ms": 40}, "verify_ms"),
        ({"verify_ms": {}}, "verify_ms"),
        ({"verify_ms": {"one": 40}}, "verify_ms"),
        ({"verify_ms": {"0": [40]}}, "verify_ms"),
    ],
)
def test_costs_that_are_none(change: dict[str, object], name: str) -> None:
    document = {"draft_ms": 7.5, "verify_ms": {"0": 40.0}, **change}
    if change.get("draft_ms", 0) is None:
        del document["draft_ms"]
    with pytest.raises(ConfigError, match=name):
        costs_from_json(document)


def test_costs_that_are_no_object() -> None:
    with pytest.raises(ConfigError, match="JSON object"):
        costs_from_json([1, 2])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, (), (0.5, 2.0)])
def test_acceptance_is_a_probability(alpha: float | tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="acceptance"):
        predicted_goodput(COSTS, Scheme(), Network(), alpha)


def test_schemes_and_links_are_checked() -> None:
    with pytest.raises(ConfigError):
        Scheme(draft_length=0)
    with pytest.raises(ConfigError):
        Network(rtt_ms=-1.0)
    with pytest.raises(ConfigError):
        Network(bandwidth_bps=0.0)
