"""The benchmark's suites are sound, and fit their budgets."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from bench import metering, plan, scenarios, spreads, step_profile
from bench.report import tables
from bench.scenarios import DRAFTS, SUITES, Condition, Suite, System, fixed
from edge_agent.config import SpeculationConfig

# Keys that the benchmark may set and that the edge may not have yet.
LATER_KEYS = {"split_rejection", "control"}
KEYS = SpeculationConfig.model_fields.keys() | LATER_KEYS


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> Suite:
    return SUITES[request.param]()


def test_a_group_compares_like_with_like_and_begins_with_the_baseline(suite: Suite) -> None:
    for group in suite.groups:
        assert group.conditions[0].system is System.CLOUD_ONLY
        assert len({condition.link for condition in group.conditions}) == 1
        names = [condition.name for condition in group.conditions]
        assert len(set(names)) == len(names)
        assert group.num_prompts >= 1
        assert group.max_tokens >= 2


def test_no_setting_is_measured_twice(suite: Suite) -> None:
    settings = [group.conditions[0].link for group in suite.groups]
    assert len(set(settings)) == len(settings)
    assert len({group.name for group in suite.groups}) == len(suite.groups)


def test_drafts_and_settings_exist(suite: Suite) -> None:
    for condition in suite.conditions:
        drafts = condition.system not in (System.CLOUD_ONLY, System.ENGINE_PLAIN)
        assert condition.draft in (DRAFTS if drafts else (None,))
        assert condition.speculation.keys() <= KEYS
        window = condition.speculation.get("window", 16)
        draft_length = condition.speculation.get("draft_length", 4)
        assert isinstance(window, int)
        assert isinstance(draft_length, int)
        assert draft_length <= window


def test_a_suite_fits_its_budget(suite: Suite) -> None:
    assert plan.total_s(suite) <= 0.9 * suite.budget_min * 60


def test_the_full_suite_covers_every_table() -> None:
    suite = scenarios.full()
    for rtt_ms in (0.0, 20.0, 50.0, 100.0, 200.0):
        here = [each for each in suite.conditions if each.link == (rtt_ms, None, 0.0)]
        for draft in DRAFTS:
            mine = {(each.system, each.overrides) for each in here if each.draft == draft}
            assert {(System.PICOSPEC, ()), (System.VANILLA, ())} <= mine
            assert {(System.PICOSPEC, fixed(n)) for n in (1, 2, 4, 8)} <= mine
            assert (System.AUTO, ()) in mine
    at_20 = {each.overrides for each in suite.conditions if each.link == (20.0, None, 0.0)}
    assert {fixed(n) for n in range(1, 9)} <= at_20
    links = {each.link for each in suite.conditions}
    assert {(20.0, None, 0.7), (20.0, None, 1.0), (20.0, 1000.0, 0.7), (20.0, 50.0, 0.7)} <= links


def test_what_takes_longer_is_estimated_longer() -> None:
    def estimate(system: System, draft: str | None, rtt_ms: float, **rest: object) -> float:
        return plan.generation_s(Condition(system, draft, rtt_ms, **rest), 64)  # type: ignore[arg-type]

    assert estimate(System.PICOSPEC, "int8", 0.0) < estimate(System.PICOSPEC, "int8", 200.0)
    assert estimate(System.PICOSPEC, "int8", 20.0) < estimate(System.VANILLA, "int8", 20.0)
    dense = estimate(System.NO_SPLIT_REJECTION, "int4", 20.0, kbit_s=50.0)
    assert dense > 10 * estimate(System.PICOSPEC, "int4", 20.0, kbit_s=50.0)


def test_a_suite_that_falls_behind_runs_fewer_prompts_but_always_one() -> None:
    assert plan.affordable(6, 60.0, 240.0, pace=1.0, left_s=300.0) == 6
    assert plan.affordable(6, 60.0, 240.0, pace=2.0, left_s=300.0) == 3
    assert plan.affordable(6, 60.0, 240.0, pace=1.0, left_s=-5.0) == 1


def test_the_plan_is_told(suite: Suite) -> None:
    lines: list[str] = []
    plan.show(suite, lines.append)
    assert len(lines) == len(suite.groups) + 2


@pytest.mark.parametrize("module", [metering, plan, scenarios, spreads, step_profile, tables])
def test_examples(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
