"""The floor's grid, arithmetic and order."""

from __future__ import annotations

import asyncio
import doctest
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.fleet import replay as replay_module
from bench.fleet.replay import ReplayDrafting, with_errors
from bench.floor import grid as grid_module
from bench.floor import report
from bench.floor.grid import FIXED, FLOOR_MIN, Change, Contender, Group, Kind, Load, grid
from bench.floor.loads import Run, Sample, rate_of_all
from bench.floor.results import Cell, best_fixed, trials
from bench.floor.runner import order, rounds
from bench.floor.sources import Spent
from bench.openings import context
from bench.systems import Stopwatch
from edge_agent.drafting.messages import DraftEvent
from picospec.protocol.drafting import Allow, Drafted

LOAD = Load(Kind.SINGLE, 20.0)
INT8 = Contender("int8")
SAMPLE = Sample(40.0, ttft_s=0.1, second_s=0.02, longest_s=0.05)
TEXTS = {"a": [1, 2, 3, 4]}
SPENT = Spent(cloud_cpu_s=0.1, edge_cpu_s=0.02, forwards=2, engine_s=0.08, drafted=6)


def run_at(tokens_per_s: float, text: list[int] | None = None) -> Run:
    texts = TEXTS if text is None else {"a": text}
    return Run({"": replace(SAMPLE, tokens_per_s=tokens_per_s)}, texts, SPENT)


def cell_at(ratio: float, contender: Contender = INT8, load: Load = LOAD) -> Cell:
    found = trials(load, [run_at(40.0)], run_at(40.0 * ratio))
    return Cell(load, contender, trials=[found[""]])


def test_names_are_as_documented() -> None:
    assert doctest.testmod(grid_module).failed == 0
    assert doctest.testmod(replay_module).failed == 0


@pytest.mark.parametrize("quick", [False, True])
def test_every_cell_is_measured_once(quick: bool) -> None:
    names = [name for group in grid(quick=quick) for name, _ in group.cells]
    assert len(set(names)) == len(names)


def test_the_grid_holds_what_was_asked_for() -> None:
    names = {name for group in grid() for name, _ in group.cells}
    for rtt_ms in (0, 20, 50, 100, 200, 500):
        for drafter in ("int4", "int8", "ngram", "stopped"):
            assert f"single rtt={rtt_ms} T=0.7 {drafter}" in names
    assert "single rtt=500 T=1 int4 assist=always mode=coupled" in names
    assert "chats=32 rtt=20 T=0 int8" in names
    assert "fleet=32 rtt=100 T=0 replay alpha=0.9" in names
    assert "turns prompt=4000 rtt=20 T=0 int8" in names
    assert {group.load.change for group in grid()} == set(Change)


def test_a_replay_errs_at_its_rate_where_its_seed_says() -> None:
    text = list(range(100, 300))
    drafts = with_errors(text, alpha=0.7, seed=1)
    assert sum(one != other for one, other in zip(drafts, text, strict=True)) == 60
    assert drafts == with_errors(text, alpha=0.7, seed=1)
    assert drafts != with_errors(text, alpha=0.7, seed=2)


async def test_a_replay_drafts_the_text_at_its_pace() -> None:
    drafting = ReplayDrafting(alpha=1.0, token_s=0.02)
    drafting.learn(2, [5, 6, 7], seed=1)
    events: asyncio.Queue[DraftEvent] = asyncio.Queue()
    prompt = np.array([1, 2], np.int32)
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    opened = drafting.open(context(prompt, 3), events.put_nowait)
    opened.send(Allow(5))
    drafted: list[int] = []
    for _ in range(3):
        event = await events.get()
        assert isinstance(event, Drafted)
        drafted += event.token_ids
    assert drafted == [5, 6, 7]
    assert loop.time() - started_s >= 0.055
    assert drafting.drafting_s / drafting.timed_tokens == pytest.approx(0.02)
    opened.close()


def test_a_ratio_is_over_the_mean_of_both_baselines() -> None:
    trial = trials(LOAD, [run_at(40.0), run_at(60.0)], run_at(75.0))[""]
    assert trial.ratio == pytest.approx(1.5)
    assert trial.stock_cpu_ms == pytest.approx(25.0)


def test_a_greedy_text_must_be_the_baselines() -> None:
    ours = run_at(50.0, [1, 2, 9, 4])
    [trial] = trials(LOAD, [run_at(40.0)], ours).values()
    [difference] = trial.differences
    assert str(difference) == "prompt a: differs from stock vLLM at token 2"
    cell = Cell(LOAD, Contender("int8"), trials=[trial])
    assert len(cell.problems) == 1
    difference.gap, difference.rounding = 0.3, 0.125  # in bf16, either may be the best token
    assert not cell.problems
    difference.gap = 0.6
    assert "logits 0.600 apart (bf16: 0.125)" in cell.problems[0]
    sampled = replace(LOAD, temperature=0.7)
    assert trials(sampled, [run_at(40.0)], ours)[""].differences == ()
    ended_early = run_at(50.0, [1, 2])
    assert trials(LOAD, [run_at(40.0)], ended_early)[""].differences == ()


def test_a_failure_is_told_and_counts_as_no_speed() -> None:
    [trial] = trials(LOAD, [run_at(40.0)], TimeoutError("late")).values()
    cell = Cell(LOAD, Contender("int8"), trials=[trial])
    assert cell.ratio == 0.0
    assert any("late" in problem for problem in cell.problems)


def test_only_the_default_settings_have_to_keep_to_the_floor() -> None:
    slow = FLOOR_MIN - 0.01
    assert cell_at(slow).problems
    assert not cell_at(slow, Contender("int8", FIXED[0])).problems
    assert not cell_at(FLOOR_MIN + 0.01).problems


def test_the_best_fixed_settings_are_those_of_the_same_drafter_and_load() -> None:
    cell = cell_at(1.0)
    others = [
        cell_at(1.2, Contender("int8", FIXED[0])),
        cell_at(1.4, Contender("int8", FIXED[1])),
        cell_at(9.0, Contender("int4", FIXED[1])),
        cell_at(9.0, Contender("int8", FIXED[1]), Load(Kind.SINGLE, 50.0)),
    ]
    assert best_fixed(cell, [cell, *others]) == pytest.approx(1.4)
    assert best_fixed(cell, [cell]) == 0.0


def test_a_baseline_is_at_both_ends_unless_nothing_may_be_asked_twice() -> None:
    one = Contender("int8")
    assert order(Group(LOAD, (one,)), 0) == [None, one, None]
    turns = Group(Load(Kind.TURNS, 20.0, prompt_tokens=30), (one,))
    assert order(turns, 0) == [None, one]
    assert order(turns, 1) == [one, None]


def test_rounds_go_on_while_a_group_fits() -> None:
    fast, slow = Group(LOAD, ()), Group(Load(Kind.SINGLE, 50.0), ())
    took_s: dict[Group, float] = {}
    now_s = [0.0]
    run = []
    for repetition, group in rounds([fast, slow], took_s, 10.0, clock=lambda: now_s[0]):
        took_s[group] = 1.0 if group is fast else 5.0
        now_s[0] += took_s[group]
        run.append((repetition, "fast" if group is fast else "slow"))
    assert run == [
        *((0, "fast"), (0, "slow"), (1, "fast"), (2, "fast"), (3, "fast")),
    ]


def test_the_document_marks_what_falls_short() -> None:
    machine: dict[str, Any] = {"processor": "a processor", "cores": 2}
    about = report.About("today", "abc", machine, 20.0, {}, wall_s=60.0)
    chats = replace(LOAD, kind=Kind.CHATS, chats=4)
    cells = [
        cell_at(0.9),
        cell_at(1.5, Contender("int8", FIXED[1])),
        cell_at(1.0, load=chats),
    ]
    text = report.document(cells, about)
    assert "20.0 GB/s" in text
    assert "| **0.90** | 0.60 |  | 0.50 | 20.0 | 25.0 | 25.0 | 1.50 | 5.0 |" in text
    assert "- single rtt=20 T=0 int8: 0.90 of stock vLLM's tokens per second" in text
    assert "chats=4" in text


def test_the_rate_of_all_leaves_out_where_only_some_are_decoded() -> None:
    watches = [
        Stopwatch(first_s=1.0, last_s=3.0, times_s=[1.0, 2.0, 2.5, 3.0]),
        Stopwatch(first_s=2.0, last_s=9.0, times_s=[2.0, 2.5, 3.0, 9.0]),
    ]
    assert rate_of_all(watches) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="ended before"):
        rate_of_all([Stopwatch(first_s=1.0, last_s=2.0), Stopwatch(first_s=2.0, last_s=3.0)])
