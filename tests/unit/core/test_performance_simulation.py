"""The event simulation: by hand, against the closed form, and against the design's estimates."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from picospec.errors import ConfigError
from picospec.performance.costs import Costs, Network, Scheme, Text, VerifyCost
from picospec.performance.prediction import best_draft_length, cloud_only, predicted_goodput
from picospec.performance.simulation import Simulation, replay_s, simulate
from picospec.protocol.messages import VerificationMode
from tests.support.builders import COUPLED, SPLIT

COSTS = Costs(
    draft_ms=7.5,
    verify_ms=VerifyCost.affine(45.5, 4.2, plain_ms=40.0),
    row_judge_ms=0.3,
    recover_ms=0.7,
)
VANILLA = Scheme(2, 2, parallel_draft=False, fast_verify=False, kept_rows=False)


def test_a_hopeless_drafter_by_hand() -> None:
    """The recovered token is there at 10, forwarded until 50; the row rejects at 50.3; the edge
    hears at 60.3 while it drafts, until 67.5, and draws until 68.2: one token a 68.2 ms."""
    prediction = simulate(COSTS, Scheme(4, 16), Network(20.0), 0.0, num_tokens=200, seed=1)
    assert prediction.tokens_per_s == pytest.approx(1e3 / 68.2)
    assert prediction.round_ms == pytest.approx(68.2)
    assert prediction.forwards_per_token == pytest.approx(1.0, abs=0.01)
    assert prediction.accepted_per_verdict == 0.0
    assert prediction.verify_ms == pytest.approx(40.0, rel=0.01)
    assert prediction.draft_ms == pytest.approx(9 * 7.5, rel=0.01)  # in 67.5 of 68.2 ms
    link = Network()
    # The recovered token, and the drafts made before the rejection was heard of.
    up = link.up_bytes(1) * (1 + 9)
    assert prediction.bytes_up_per_token == pytest.approx(up, rel=0.15)
    assert prediction.bytes_down_per_token == link.verdict_bytes + link.rejection_bytes


def test_vanilla_speculation_by_hand() -> None:
    """Rounds of two, all accepted: 15 + 20 + T_v(2) = 88.9 ms, one verdict, one forward."""
    prediction = simulate(COSTS, VANILLA, Network(20.0), 1.0, num_tokens=400, seed=1)
    assert prediction.tokens_per_s == pytest.approx(2e3 / 88.9)
    assert prediction.round_ms == pytest.approx(88.9)
    assert prediction.draft_ms == pytest.approx(15.0)
    assert prediction.verify_ms == pytest.approx(53.9)
    assert prediction.accepted_per_verdict == 2.0
    assert prediction.forwards_per_token == 0.5
    assert prediction.bytes_down_per_token == Network().verdict_bytes / 2


def test_coupled_vanilla_speculation_by_hand() -> None:
    scheme = dataclasses.replace(VANILLA, mode=COUPLED)
    prediction = simulate(COSTS, scheme, Network(20.0), 1.0, num_tokens=300, seed=1)
    assert prediction.tokens_per_s == pytest.approx(3e3 / 88.9)


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rtt_ms", [0.0, 53.37])
@pytest.mark.parametrize(("draft_length", "window"), [(1, 4), (4, 16), (7, 5)])
@pytest.mark.parametrize("places", [1, 2, 4, 9])
def test_a_rejection_at_a_known_place(
    mode: VerificationMode,
    parallel: bool,
    fast: bool,
    kept: bool,
    rtt_ms: float,
    draft_length: int,
    window: int,
    places: int,
) -> None:
    """Every chain ends at the same place: nothing is left to chance, and the closed form must
    agree with the simulation exactly."""
    scheme = Scheme(
        draft_length, window, parallel_draft=parallel, fast_verify=fast, mode=mode, kept_rows=kept
    )
    alpha = (1.0,) * (places - 1) + (0.0,)
    link = Network(rtt_ms, bandwidth_bps=50e6)
    played = simulate(COSTS, scheme, link, alpha, num_tokens=60 * places, seed=1)
    predicted = predicted_goodput(COSTS, scheme, link, alpha)
    # A bonus token in the place of the bad draft makes the chain longer: the end is cut elsewhere.
    tolerance = 0.02 if mode is COUPLED else 1e-6
    assert played.tokens_per_s == pytest.approx(predicted, rel=tolerance)


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("rtt_ms", [0.0, 120.0])
@pytest.mark.parametrize("alpha", [0.69, (0.5, 0.7, 0.8)])
def test_the_closed_form_is_the_simulations_mean(
    mode: VerificationMode, fast: bool, rtt_ms: float, alpha: float | tuple[float, ...]
) -> None:
    scheme = Scheme(4, 16, fast_verify=fast, mode=mode)
    played = simulate(COSTS, scheme, Network(rtt_ms), alpha, num_tokens=10_000, seed=3)
    predicted = predicted_goodput(COSTS, scheme, Network(rtt_ms), alpha)
    assert predicted == pytest.approx(played.tokens_per_s, rel=0.03)


def test_a_seed_plays_the_same_session() -> None:
    first, second, other = (
        simulate(COSTS, Scheme(), Network(30.0), 0.7, num_tokens=500, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_a_dense_rejection_waits_for_the_wire() -> None:
    narrow = Network(20.0, bandwidth_bps=20e6)
    dense = dataclasses.replace(narrow, rejection_bytes=393_216)
    one, other = (simulate(COSTS, Scheme(), link, 0.7, 2000, seed=1) for link in (narrow, dense))
    assert other.tokens_per_s < 0.6 * one.tokens_per_s
    assert other.bytes_down_per_token > 50 * one.bytes_down_per_token


def test_the_switches_cost_what_the_paper_says_in_kind() -> None:
    """Each module of the paper earns its place where the drafter is good."""
    link, good = Network(20.0), 0.9
    full = simulate(COSTS, Scheme(4), link, good, 4000, seed=1)
    waiting = simulate(COSTS, Scheme(4, parallel_draft=False), link, good, 4000, seed=1)
    whole = simulate(COSTS, Scheme(4, fast_verify=False), link, good, 4000, seed=1)
    assert waiting.tokens_per_s < 0.8 * full.tokens_per_s
    assert whole.tokens_per_s < 1.05 * full.tokens_per_s
    assert (
        simulate(COSTS, Scheme(4, kept_rows=False), link, good, 4000, seed=1).tokens_per_s
        < full.tokens_per_s
    )


def test_a_world_that_changes_while_it_is_played() -> None:
    simulation = Simulation(COSTS, Scheme(), Network(0.0), 0.7, seed=1)
    simulation.run(until_ms=5_000.0)
    near = simulation.num_tokens
    simulation.world.link = Network(200.0)
    simulation.run(until_ms=10_000.0)
    assert simulation.world.now_ms == 10_000.0
    assert simulation.num_tokens - near < near / 2
    assert simulation.prediction().tokens_per_s == pytest.approx(simulation.num_tokens / 10.0)


def outcomes(text: str, **prefill_ms: float) -> Text:
    return Text(tuple(outcome == "+" for outcome in text), **prefill_ms)


def test_a_replayed_text_by_hand() -> None:
    """Vanilla, rounds of two, "+-": the first token is at the edge at 0, the drafter begins. The
    round is there at 25, judged at 78.9, its rejection known at 88.9 and mended at 89.6; the
    round of one that is left: 7.5 + 10 + T_v(1) 49.7 + 10 later."""
    text = outcomes("-+-+")
    assert replay_s(COSTS, VANILLA, Network(20.0), text) == pytest.approx((89.6 + 77.2) / 1e3)


@pytest.mark.parametrize("scheme", [VANILLA, Scheme(4, 16), Scheme(4, 16, fast_verify=False)])
def test_a_replay_is_a_run_whose_luck_is_known(scheme: Scheme) -> None:
    """All right, or all wrong, it is what chance without choice gives, but for the ends."""
    for sign, alpha in (("+", 1.0), ("-", 0.0)):
        text = outcomes("-" + sign * 2000)
        expected = simulate(COSTS, scheme, Network(20.0), alpha, num_tokens=2000, seed=1)
        speed = 2000 / replay_s(COSTS, scheme, Network(20.0), text)
        assert speed == pytest.approx(expected.tokens_per_s, rel=0.01)


def test_drafts_made_before_the_first_token_count() -> None:
    """While the cloud prefills over a long link, the edge drafts; if the first draft is right,
    the cloud can go on at once."""
    link, prefill = Network(200.0), {"cloud_prefill_ms": 300.0, "edge_prefill_ms": 100.0}
    right = replay_s(COSTS, Scheme(4, 32), link, outcomes("+" * 32, **prefill))
    wrong = replay_s(COSTS, Scheme(4, 32), link, outcomes("-" + "+" * 31, **prefill))
    assert right < 0.7 * wrong
    late = replay_s(COSTS, Scheme(4, 32), link, outcomes("+" * 32, cloud_prefill_ms=300.0,
                                                         edge_prefill_ms=2000.0))  # fmt: skip
    assert late > right


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_every_replay_ends(mode: VerificationMode, parallel: bool, fast: bool) -> None:
    scheme = Scheme(3, 7, parallel_draft=parallel, fast_verify=fast, mode=mode, kept_rows=fast)
    for bits in itertools.product("+-", repeat=6):
        text = outcomes("".join(bits), cloud_prefill_ms=90.0, edge_prefill_ms=30.0)
        assert replay_s(COSTS, scheme, Network(40.0), text) > 0.0


def test_a_text_is_not_empty() -> None:
    with pytest.raises(ConfigError):
        outcomes("")


def test_a_bad_acceptance_is_refused() -> None:
    with pytest.raises(ConfigError):
        simulate(COSTS, Scheme(), Network(), 1.5, 10, seed=1)


# The design's own estimates: speed-up over T_v(0) = 40 ms per token by RTT, from a simulation
# without overheads. What it assumed of windows and kept rows is not on record: the margin is wide.
RTTS_MS = (0.0, 20.0, 50.0, 200.0, 500.0)
STREAMING = {"window": 64}
DESIGN = [
    (COUPLED, 0.66, 7.5, {"parallel_draft": False, "fast_verify": False},
     (1.21, 0.94, 0.73, 0.35, 0.18)),
    (COUPLED, 0.965, 13.2, {"parallel_draft": False, "fast_verify": False},
     (1.70, 1.54, 1.34, 0.82, 0.46)),
    (COUPLED, 0.66, 7.5, STREAMING, (1.36, 1.10, 0.87, 0.42, 0.21)),
    (SPLIT, 0.69, 7.5, STREAMING, (1.41, 1.15, 0.93, 0.47, 0.23)),
    (SPLIT, 0.965, 13.2, STREAMING, (2.50, 2.37, 2.24, 1.60, 1.05)),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "alpha", "draft_ms", "switches", "expected"), DESIGN)
def test_the_designs_estimates(
    mode: VerificationMode,
    alpha: float,
    draft_ms: float,
    switches: dict[str, bool],
    expected: tuple[float, ...],
) -> None:
    costs = Costs(draft_ms, COSTS.verify_ms)
    scheme = Scheme(mode=mode, **switches)
    for rtt_ms, speedup in zip(RTTS_MS, expected, strict=True):
        _, goodput = best_draft_length(costs, scheme, Network(rtt_ms), alpha)
        assert goodput / cloud_only(costs) == pytest.approx(speedup, rel=0.15)
