"""The report from a small result: its file, its tables, its plots."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import results
from bench.report import document, tables
from bench.report.prediction import predictors
from bench.results import ConditionResult, Costs, GroupResult, Record, Result
from bench.scenarios import ABLATED, ADAPTIVE, Group, System, fixed, group
from picospec_cli.__main__ import main

RATES = {  # tokens/s on the first prompt; the second one is 10 % faster everywhere
    System.CLOUD_ONLY: 20.0,
    System.PICOSPEC: 30.0,
    System.NEVER_WAITING: 32.0,
    System.VANILLA: 15.0,
    System.NO_PARALLEL_DRAFTING: 18.0,
    System.NO_FAST_VERIFICATION: 27.0,
    System.NO_SPLIT_REJECTION: 24.0,
}
PLAIN = ((System.PICOSPEC, ()), (System.NEVER_WAITING, ()), (System.VANILLA, ()))
SWEPT = tuple((System.PICOSPEC, overrides) for overrides in (*map(fixed, (3, 4, 5)), ADAPTIVE))


def measured(planned: Group) -> GroupResult:
    conditions = []
    for number, condition in enumerate(planned.conditions):
        drafts = condition.draft is not None
        records = [
            Record(
                prompt_id=prompt,
                order=number,
                token_ids=list(range(11)),
                ttft_s=0.2,
                seconds=10 / (RATES[condition.system] * speed),
                drafted=12 * drafts,
                drafts_sent=16 * drafts,
                accepted=9 * drafts,
                verdicts=4,
                rejections=2 * drafts,
                outcomes="++-++++-+++" * drafts,
                draft_bytes=160 * drafts,
                rejection_bytes=120 * drafts,
                draft_ms=8.0 * drafts,
                payload_up=300,
                wire_up=500,
                compared=condition.temperature == 0.0 and drafts,
            )
            for prompt, speed in (("a", 1.0), ("b", 1.1))
        ]
        conditions.append(ConditionResult(condition, records))
    conditions[0].baseline = True
    return GroupResult(planned.name, planned.max_tokens, conditions=conditions)


@pytest.fixture
def result() -> Result:
    planned = [
        group("RTT 0 ms", (0.0, None, 0.0), PLAIN, num_prompts=2, max_tokens=11),
        group("RTT 20 ms", (20.0, None, 0.0), (*PLAIN, *SWEPT), num_prompts=2, max_tokens=11),
        group("ablation", (20.0, None, 0.7), ABLATED, num_prompts=2, max_tokens=11),
        group("1 Mbit/s", (20.0, 1000.0, 0.7), ABLATED[:1], num_prompts=2, max_tokens=11),
    ]
    machine = {
        "processor": "a processor",
        "vector_extensions": ["avx2"],
        "cores": 2,
        "memory_gib": 4.0,
        "load_average": 0.0,
        "python": "3.11",
        "kernel": "6",
        "versions": {"numpy": "2"},
    }
    return Result(
        suite="tiny",
        date="2026-01-01T00:00:00+00:00",
        commit="abc",
        machine=machine,
        settings={"both": {"dtype": "float32"}, "stock": {"eager": False}},
        groups=[measured(each) for each in planned],
        costs=Costs(
            {"coupled": {0: 40.0, 4: 60.0}, "split": {4: 61.0}},
            {"int4": 7.5, "int8": 13.2},
            baseline_ms=42.0,
            recover_ms={draft: {"sparse": 0.4, "whole": 0.9} for draft in ("int4", "int8")},
        ),
    )


def test_ratios_are_taken_prompt_by_prompt(result: Result) -> None:
    measured = result.groups[0]
    ratio = measured.speedup(measured.conditions[1])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert ratio.n == 2


def test_a_baseline_measured_twice_counts_by_its_mean(result: Result) -> None:
    baseline = result.groups[0].baseline
    slow = Record("a", 9, token_ids=list(range(11)), ttft_s=0.2, seconds=10 / 10.0)
    baseline.records.append(slow)
    assert baseline.speeds()["a"] == pytest.approx(15.0)


def test_a_file_keeps_everything(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tiny.json"
    result.groups[0].conditions[1].records.append(
        Record("c", 0, token_ids=[], ttft_s=0.0, seconds=0.0, error="lost")
    )
    result.save(path)
    assert results.load(path) == result
    written = json.loads(path.read_text())["groups"][0]["conditions"][1]
    assert written["speedup"]["median"] == pytest.approx(1.5)


def test_the_report_has_every_table(result: Result) -> None:
    text = document.render(result, {}, predict={"outcomes": lambda each: 30.0})
    for title in (
        "Speed-up over the cloud alone",
        "Adaptive draft length",
        "Draft length",
        "What each part is worth",
        "The paper's ablation",
        "Bytes",
        "Bandwidth",
        "Temperature",
        "Costs of the parts",
        "Predicted and measured",
    ):
        assert f"## {title}" in text
    assert "| PicoSpec, int4 | **1.50** (1.50–1.50), 31.5 |" in text
    assert "| without parallel drafting, int8 | **0.90** (0.90–0.90), 18.9 | 0.60 |" in text
    assert "| the paper |" not in text.split("## Bytes")[0]
    assert "token for token: 40 of 40" in text


def test_rows_have_as_many_cells_as_heads(result: Result) -> None:
    lines = document.render(result, {}, predict={"outcomes": lambda each: 30.0}).splitlines()
    widths: list[int] = []
    for line in lines:
        if not line.startswith("|"):
            widths = []
            continue
        widths.append(line.count("|"))
        assert widths[-1] == widths[0], line


def test_a_text_that_differs_is_named(result: Result) -> None:
    each = result.groups[1].conditions[1]
    record = each.records[0]
    each.records[0] = Record(
        "a",
        0,
        token_ids=record.token_ids,
        ttft_s=0.2,
        seconds=1.0,
        compared=True,
        first_difference=7,
    )
    text = document.render(result, {})
    assert "token for token: 39 of 40" in text
    assert "PicoSpec, int4, RTT 20 ms, prompt a: from token 7 on" in text


def test_what_was_not_measured_leaves_no_section(result: Result) -> None:
    result.groups = result.groups[:1]
    result.not_run = ["ablation: no such key"]
    text = document.render(result, {})
    for title in ("Draft length", "What each part is worth", "Bandwidth", "Temperature"):
        assert f"## {title}\n" not in text
    assert "- ablation: no such key" in text


def test_the_adaptive_length_beside_the_best_fixed_one(result: Result) -> None:
    speeds = {
        (("draft_length", 3),): {"a": 1.0, "b": 2.0},
        (("draft_length", 4),): {"a": 2.0, "b": 1.5},
        (("control", "adaptive"),): {"a": 1.8, "b": 1.5},
    }
    for each in result.groups[1].conditions:
        if each.condition.overrides in speeds and each.condition.draft == "int4":
            wanted = speeds[each.condition.overrides]
            each.records = [
                replace(record, seconds=10 / wanted[record.prompt_id]) for record in each.records
            ]
        elif each.condition.overrides:
            each.records = []
    text = tables.control_shares(result)
    assert "| int4, best in hindsight | 95% of n = 4 |" in text  # 0.9 and 1.0
    assert "| int4, best on the other prompts | 140% |" in text  # 1.8 of 1.0, 1.5 of 1.5


def test_predictions_beside_measurements(result: Result) -> None:
    text = tables.predictions(
        result,
        {
            "outcomes": lambda each: 1.2 * each.spread(_rate).median,
            "rate": lambda each: 0.7 * each.spread(_rate).median,
        },
    )
    assert "conditions: outcomes **20.0%**, rate **30.0%**" in text


def test_a_text_that_was_drafted_ahead_of_its_first_token_is_predicted(result: Result) -> None:
    each = result.groups[1].conditions[1]
    assert each.condition.draft == "int4"
    each.records = [replace(each.records[0], draft_ms=0.0, outcomes="+" * 11)]
    for name, predict in predictors(result).items():
        guess = predict(each)
        assert guess is not None, name
        assert 0.0 < guess < 1e3 / result.costs.draft_ms["int4"]


def test_the_plots_are_written(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = document.write(result, tmp_path)
    pictures = re.findall(r"\]\((tiny-\w+\.png)\)", path.read_text())
    assert pictures == ["tiny-speedup.png", "tiny-lengths.png", "tiny-ablation.png"]
    for picture in pictures:
        assert (tmp_path / picture).stat().st_size > 5000
        assert (tmp_path / picture).with_suffix(".svg").read_text().startswith("<?xml")


def test_the_costs_are_what_the_predict_command_reads(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document.write(result, tmp_path)
    path = tmp_path / "tiny-costs.json"
    written = json.loads(path.read_text())
    assert written["drafts"]["int8"]["alpha"] == 1.0  # nine accepted of each, no misses on record
    assert written["verify_ms"] == {"0": 40.0, "4": 61.0}
    assert written["plain_ms"] == 42.0
    assert main(["predict", "--costs", str(path), "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert len(cases) == 2


def _rate(record: Record) -> float:
    return record.tokens_per_s
