"""`picospec predict`: the table, the JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from picospec.performance.costs import Costs, Network, Scheme, VerifyCost
from picospec.performance.prediction import predicted_goodput
from picospec_cli.__main__ import main
from picospec_cli.predict import DEFAULT_COSTS

MEASURED = {
    "verify_ms": {"0": 20, "1": 21, "8": 30},
    "draft_ms": 5,
    "alpha": [0.6, 0.8],
    "recover_ms": 0.4,
    "plain_ms": 25,
    "machine": "ignored",
}


def model_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["predict", "--json", *words]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def costs_file(tmp_path: Path, document: object) -> str:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_the_defaults_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict"]) == 0
    table = capsys.readouterr().out
    assert "int4: 7.5 ms per draft, acceptance 0.69; cloud-only decoding 25.0 tokens/s" in table
    assert "int8: 13.2 ms per draft" in table
    assert table.count("break-even RTT") == 2
    assert "n=8" in table
    assert "n=9" not in table


def test_the_numbers_are_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    document = model_json(capsys, "--rtt", "30", "--window", "12")
    first = document["cases"][0]
    points = {int(k): ms for k, ms in DEFAULT_COSTS["verify_ms"].items()}
    expected = predicted_goodput(
        Costs(7.5, VerifyCost.measured(points)), Scheme(4, 12), Network(30.0), 0.69
    )
    (row,) = first["rows"]
    assert row["tokens_per_s"]["4"] == pytest.approx(expected)
    assert row["best_tokens_per_s"] == max(row["tokens_per_s"].values())
    assert row["speedup"] == pytest.approx(row["best_tokens_per_s"] / 25.0)
    assert 0.0 < first["break_even_rtt_ms"] < 100.0


def test_a_costs_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document = model_json(capsys, "--costs", costs_file(tmp_path, MEASURED), "--mode", "coupled")
    assert document["mode"] == "coupled"
    (case,) = document["cases"]
    assert case["alpha"] == [0.6, 0.8]
    assert case["cloud_only_tokens_per_s"] == 40.0


def test_the_command_line_goes_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--costs", costs_file(tmp_path, MEASURED), "--draft-ms", "2", "--alpha", "0.1", "1"]
    slow, sure = model_json(capsys, *words, "--rtt", "0", "--draft-length-max", "3")["cases"]
    assert slow["draft_ms"] == sure["draft_ms"] == 2.0
    assert (slow["alpha"], sure["alpha"]) == (0.1, 1.0)
    assert len(sure["rows"][0]["tokens_per_s"]) == 3
    assert sure["rows"][0]["best_tokens_per_s"] > slow["rows"][0]["best_tokens_per_s"]


def test_a_break_even_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["predict", "--alpha", "0"]) == 0
    assert "slower than cloud-only decoding at any RTT" in capsys.readouterr().out
    path = costs_file(tmp_path, MEASURED | {"plain_ms": 1e6})
    assert main(["predict", "--costs", path]) == 0
    assert "none below 10000 ms" in capsys.readouterr().out


def test_the_simulation_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rtt", "20", "--draft-ms", "7.5", "--alpha", "0.69", "--draft-length-max", "2"]
    predicted, played = (
        model_json(capsys, *words, *more)["cases"][0]["rows"][0]["best_tokens_per_s"]
        for more in ([], ["--simulate", "5000"])
    )
    assert played == pytest.approx(predicted, rel=0.05)


def test_switches(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rtt", "20", "--bandwidth-mbps", "10", "--draft-length-max", "4"]

    def best(*more: str) -> float:
        speed: float = model_json(capsys, *words, *more)["cases"][0]["rows"][0]["speedup"]
        return speed

    full = best()
    assert best("--no-parallel-draft") < full
    assert best("--no-fast-verify") < full
    assert best("--no-kept-rows") < full
    assert best("--dense-width", "49152") < 0.6 * full


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "JSON object"),
        ({"draft_ms": 5}, "verify_ms"),
        ({"verify_ms": {"0": 40}}, "draft_ms"),
        ({"verify_ms": {"0": 40}, "draft_ms": 5}, "--alpha"),
        ({"verify_ms": {"0": 40}, "draft_ms": 5, "alpha": 2}, "between 0 and 1"),
        ({"verify_ms": {"0": 40}, "draft_ms": 5, "alpha": ["much"]}, "alpha of 'draft'"),
        ({"verify_ms": {"0": 40}, "drafts": [1]}, "object of objects"),
    ],
)
def test_files_that_say_too_little(
    document: object, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["predict", "--costs", costs_file(tmp_path, document)]) == 1
    assert message in capsys.readouterr().err


def test_no_file_and_no_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["predict", "--costs", str(tmp_path / "absent.json")]) == 1
    (tmp_path / "costs.json").write_text("{")
    assert main(["predict", "--costs", str(tmp_path / "costs.json")]) == 1
    assert "is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--rtt", "-1"], ["--window", "0"], ["--draft-length-max", "0"]])
def test_impossible_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *words]) == 1
    assert "must be" in capsys.readouterr().err
