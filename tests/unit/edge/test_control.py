"""Where drafting pays, who is told how far to draft, and in which mode a generation goes."""

from __future__ import annotations

import json

import pytest

from edge_agent.control import AutoControl, AutoCourse, FixedControl
from edge_agent.estimates import Arm, Estimates, Setting
from picospec.protocol.edge_machine import SpeculationPolicy
from picospec.protocol.messages import SamplingParams, VerificationMode
from tests.support.builders import COUPLED, GREEDY, SPLIT, make_verdict

MODES = tuple(VerificationMode)
WARM = SamplingParams(temperature=0.7)
STEP_S = 0.02


class Edge:
    """An edge in a world with given speeds, in tokens per second of a generation."""

    def __init__(self, *, on: float, off: float, estimates: Estimates | None = None) -> None:
        self.control = AutoControl(estimates or Estimates(), MODES)
        self.on, self.off = on, off
        self.now = 100.0
        self.batch_size, self.budget, self.rtt_s = 1, 8, 0.02

    def chat(self, seconds: float, course: AutoCourse | None = None) -> float:
        """Answer for so long; the share of that time in which the drafter drafted."""
        course = course or self.control.begin(GREEDY, seeded=False, now=self.now)
        ends_s = self.now + seconds
        drafting_s = tokens = 0.0
        self.verdict(course, 1)
        self.now += STEP_S
        self.verdict(course, 1)  # no draft is there yet
        while self.now < ends_s:
            drafts = course.plan(self.now).window > 0
            drafting_s += STEP_S * drafts
            self.now += STEP_S
            tokens += STEP_S * (self.on if drafts else self.off)
            if tokens >= 1.0 + drafts:  # with drafts, one at least is accepted
                self.verdict(course, int(tokens), num_drafts=(int(tokens) - 1) * drafts)
                tokens -= int(tokens)
        return drafting_s / seconds

    def verdict(self, course: AutoCourse, num_tokens: int, *, num_drafts: int = 0) -> None:
        verdict = make_verdict(
            position=5, num_accepted=num_tokens - 1, num_draft_tokens=num_drafts,
            compute_us=20_000, batch_size=self.batch_size, draft_budget=self.budget,
        )  # fmt: skip
        course.heard(verdict, num_tokens, self.rtt_s, self.now)


def test_a_fixed_control_goes_by_the_settings() -> None:
    control = FixedControl(SpeculationPolicy(SPLIT, draft_length=3, window=9))
    course = control.begin(WARM, seeded=True, now=0.0)
    assert course.mode is SPLIT
    plan = course.plan(1.0)
    assert (plan.draft_length, plan.window) == (3, 9)


def test_drafting_that_pays_is_kept_up() -> None:
    edge = Edge(on=80.0, off=50.0)
    edge.chat(4.0)
    assert edge.chat(60.0) > 0.97


def test_drafting_that_does_not_pay_ends() -> None:
    edge = Edge(on=40.0, off=50.0)
    edge.chat(4.0)
    assert edge.chat(60.0) < 0.05


def test_it_is_looked_at_again() -> None:
    edge = Edge(on=40.0, off=50.0)
    edge.chat(20.0)
    edge.on = 90.0
    edge.chat(40.0)
    assert edge.chat(30.0) > 0.9


def test_another_round_trip_is_another_setting() -> None:
    """Within five seconds."""
    edge = Edge(on=80.0, off=50.0)
    edge.chat(20.0)
    edge.rtt_s, edge.on = 0.2, 30.0
    edge.chat(5.0)
    assert edge.chat(10.0) < 0.1


def test_another_load_is_another_setting() -> None:
    edge = Edge(on=80.0, off=50.0)
    edge.chat(20.0)
    edge.batch_size, edge.on, edge.off = 16, 8.0, 12.0
    edge.chat(5.0)
    assert edge.chat(20.0) < 0.1


def test_nobody_drafts_what_the_cloud_cannot_use() -> None:
    edge = Edge(on=80.0, off=50.0)
    edge.budget = 0
    assert edge.chat(5.0) < 0.05


def test_what_one_chat_learns_the_next_one_knows() -> None:
    edge = Edge(on=40.0, off=50.0)
    edge.chat(5.0)
    course = edge.control.begin(GREEDY, seeded=False, now=edge.now)
    assert course.plan(edge.now).window == 0


def test_a_chat_with_a_hard_text_leaves_off_by_itself() -> None:
    edge = Edge(on=80.0, off=50.0)
    edge.chat(20.0)
    edge.on = 45.0  # of this chat
    assert edge.chat(16.0) < 0.35
    edge.on = 80.0
    assert edge.chat(10.0) > 0.9


@pytest.mark.parametrize(("on", "drafts"), [(80.0, True), (40.0, False)])
def test_what_was_learnt_survives_a_restart(on: float, drafts: bool) -> None:
    edge = Edge(on=on, off=50.0)
    edge.chat(8.0)
    document = json.loads(json.dumps(edge.control.estimates.as_json()))
    again = Edge(on=on, off=50.0, estimates=Estimates.from_json(document))
    assert (again.chat(5.0) > 0.5) is drafts


@pytest.mark.parametrize(
    ("sampling", "seeded", "mode"),
    [(GREEDY, False, COUPLED), (WARM, True, COUPLED)],
)
def test_texts_that_must_be_a_function_of_their_seed_are_coupled(
    sampling: SamplingParams, seeded: bool, mode: VerificationMode
) -> None:
    control = AutoControl(Estimates(), MODES)
    for _ in range(50):
        assert control.begin(sampling, seeded=seeded, now=0.0).mode is mode


@pytest.mark.parametrize(("split", "coupled"), [(60.0, 50.0), (50.0, 60.0)])
def test_a_sampled_generation_goes_in_the_faster_mode(split: float, coupled: float) -> None:
    estimates = Estimates()
    setting = Setting.of(batch_size=1, round_trip_ms=0.0, sampled=True)
    for arm, per_second in ((Arm.SPLIT, split), (Arm.COUPLED, coupled)):
        estimates.rate(setting, arm).add(int(2 * per_second), 2.0)
    control = AutoControl(estimates, MODES)
    modes = [control.begin(WARM, seeded=False, now=0.0).mode for _ in range(100)]
    faster = SPLIT if split > coupled else COUPLED
    assert 85 <= modes.count(faster) < 100  # the other one is looked at now and then


def test_the_window_grows_with_the_round_trip_and_shrinks_with_hope() -> None:
    estimates = Estimates()
    control = AutoControl(estimates, MODES)
    control.drafted(10, 0.08)
    estimates.step.add(20.0)
    estimates.acceptance.add(1.0, 1000.0)
    windows = []
    for round_trip_ms in (0.0, 50.0, 200.0):
        estimates.round_trip.total, estimates.round_trip.weight = round_trip_ms, 1.0
        windows.append(control.window(16))
    assert windows == sorted(windows)
    assert windows[0] >= 4
    assert windows[-1] >= 30
    estimates.acceptance.add(0.0, 1000.0)
    assert control.window(16) <= 5


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"version": 2},
        {"version": 1, "drafting_ms": float("nan")},
        {**Estimates().as_json(), "rates": [[0, 5, False, "sideways", 3.0]]},
        {**Estimates().as_json(), "rates": [[0, 5, False, "off", -3.0]]},
        {**Estimates().as_json(), "rates": 7},
    ],
)
def test_a_file_that_is_no_estimates_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Estimates.from_json(document)


def test_where_drafts_clearly_beat_one_token_a_step_nobody_looks_at_the_cloud_alone() -> None:
    edge = Edge(on=90.0, off=45.0)  # a step takes 20 ms: without drafts there are 50 at most
    assert edge.chat(20.0) == pytest.approx(1.0, abs=0.02)
    edge = Edge(on=55.0, off=40.0)  # that may be the step's noise
    assert edge.chat(20.0) < 0.99


def test_what_does_not_pay_in_a_small_batch_is_not_tried_at_once_in_a_larger_one() -> None:
    edge = Edge(on=30.0, off=50.0)
    edge.chat(20.0)
    edge.batch_size = 2
    assert edge.chat(6.0) < 0.1
    edge.on = 90.0  # looked at some seconds later all the same
    assert edge.chat(30.0) > 0.5


def test_drafts_are_tried_on_a_slow_link_before_there_is_no_hope_of_them() -> None:
    edge = Edge(on=80.0, off=50.0)
    edge.rtt_s = 0.2
    assert edge.chat(10.0) > 0.5


def test_in_a_crowd_the_cloud_begins_alone() -> None:
    edge = Edge(on=90.0, off=50.0)
    edge.batch_size = 16
    assert edge.chat(2.0) < 0.1
    assert edge.chat(20.0) > 0.9


def test_drafting_is_judged_by_its_drafts_not_by_the_wait_for_the_first() -> None:
    """Four chats whose prompts the drafter has to prefill."""
    edge = Edge(on=80.0, off=50.0)
    edge.batch_size = 4
    course = edge.control.begin(GREEDY, seeded=False, now=edge.now)
    for _ in range(50):  # a second in which no draft comes, and the drafter slows the cloud down
        course.plan(edge.now)
        edge.now += STEP_S
        edge.verdict(course, 1)
    assert edge.chat(10.0, course) > 0.7


def test_another_round_trip_does_not_make_the_cloud_alone_unknown() -> None:
    edge = Edge(on=58.0, off=50.0)  # too little above a token for each step to be clear
    edge.chat(20.0)
    edge.rtt_s = 0.2
    assert edge.chat(5.0) == pytest.approx(1.0)


def test_drafts_that_gain_in_bursts_go_on() -> None:
    """A slow link: seconds at a little less than the cloud alone, then many tokens at once."""
    edge = Edge(on=60.0, off=50.0)
    edge.chat(20.0)
    course = edge.control.begin(GREEDY, seeded=False, now=edge.now)
    drafting = 0.0
    for _ in range(10):
        edge.on = 46.0
        drafting += 1.5 * edge.chat(1.5, course)
        edge.on = 100.0
        drafting += 0.5 * edge.chat(0.5, course)
    assert drafting > 0.95 * 20.0


def test_a_generation_begins_with_the_load_that_the_last_one_has_seen() -> None:
    edge = Edge(on=80.0, off=50.0)
    edge.budget = 0
    edge.chat(2.0)
    assert edge.control.begin(GREEDY, seeded=False, now=edge.now).plan(edge.now).window == 0
    edge.now += 60.0  # the crowd may be gone
    assert edge.control.begin(GREEDY, seeded=False, now=edge.now).plan(edge.now).window > 0


def test_a_drafter_that_cannot_get_ahead_of_the_cloud_rests_and_is_tried_again() -> None:
    """Four chats share a drafter that takes a third of a step for a token."""
    edge = Edge(on=80.0, off=50.0)
    edge.control.drafted(100, 0.7)
    edge.chat(1.0)
    others = [edge.control.begin(GREEDY, seeded=False, now=edge.now) for _ in range(3)]
    assert edge.chat(10.0) < 0.05
    assert edge.chat(60.0) > 0.2
    edge.control.drafted(100, 0.7)
    assert edge.chat(10.0) < 0.05
    for other in others:
        other.end()
    edge.control.drafted(100, 0.1)
    assert edge.chat(10.0) > 0.5
