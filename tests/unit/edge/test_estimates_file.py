"""What an edge has learnt outlives it, and is used with the same two models only."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent import config as edge_config
from edge_agent.drafting.messages import DrafterSpec
from edge_agent.estimates import Arm, Estimates, Setting
from edge_agent.estimates_file import PAIRS_MAX, EstimatesFile, drafter_identity, place
from edge_agent.server import estimates_place
from picospec.protocol.messages import ModelCard
from tests.support.edge_api import CARD

OTHER_CARD = replace(CARD, model_id="another-model")
NOTHING = Estimates().as_json()


def learnt(step_ms: float = 21.0) -> Estimates:
    estimates = Estimates()
    estimates.step.add(step_ms)
    estimates.rate(Setting(0, 5, sampled=False), Arm.OFF).add(50, 1.0)
    return estimates


def keep(
    path: Path, estimates: Estimates, *, drafter: str = "int8", card: ModelCard = CARD
) -> None:
    """By an edge that learns `estimates` and ends."""
    own = Estimates()
    file = EstimatesFile(path, own, drafter)
    file.served(card)
    own.step, own.rates = estimates.step, estimates.rates
    file.write()


def kept(path: Path, *, drafter: str = "int8", card: ModelCard = CARD) -> dict[str, object]:
    """What the next edge begins with."""
    estimates = Estimates()
    EstimatesFile(path, estimates, drafter).served(card)
    return estimates.as_json()


def test_it_comes_back_with_the_same_models_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "estimates.json"
    assert kept(path) == NOTHING
    keep(path, learnt())
    assert kept(path)["step_ms"] == pytest.approx(21.0)
    assert kept(path)["rates"] == learnt().as_json()["rates"]
    assert os.listdir(path.parent) == ["estimates.json"]
    assert kept(path, drafter="int4") == NOTHING
    assert kept(path, card=OTHER_CARD) == NOTHING
    moved = replace(CARD, max_model_len=CARD.max_model_len + 1)  # the same model, elsewhere
    assert kept(path, card=moved) == kept(path)


def test_agents_with_one_home_keep_what_the_others_have_learnt(tmp_path: Path) -> None:
    path = tmp_path / "estimates.json"
    keep(path, learnt(21.0), drafter="int8")
    keep(path, learnt(42.0), drafter="int4")
    keep(path, learnt(22.0), drafter="int8")
    assert kept(path, drafter="int8")["step_ms"] == pytest.approx(22.0)
    assert kept(path, drafter="int4")["step_ms"] == pytest.approx(42.0)
    for number in range(PAIRS_MAX):
        keep(path, learnt(), drafter=f"draft {number}")
    assert kept(path, drafter="int4") == NOTHING
    assert kept(path, drafter="draft 0") != NOTHING


def test_when_the_cloud_changes_its_model_so_do_the_estimates(tmp_path: Path) -> None:
    path = tmp_path / "estimates.json"
    estimates = Estimates()
    file = EstimatesFile(path, estimates, "int8")
    file.served(CARD)
    estimates.step.add(21.0)
    file.served(CARD)  # as each poll says
    assert estimates.step.mean() == pytest.approx(21.0)
    file.served(OTHER_CARD)
    assert estimates.as_json() == NOTHING
    file.served(CARD)
    assert estimates.step.mean() == pytest.approx(21.0)


def test_before_the_cloud_is_known_nothing_is_written(tmp_path: Path) -> None:
    EstimatesFile(tmp_path / "estimates.json", learnt(), "int8").write()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"{}",
        b"[]",
        b'{"version": 1}',
        b'{"version": 2, "pairs": 7}',
        b'{"version": 2, "pairs": [7, {}]}',
    ],
)
def test_a_damaged_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "estimates.json"
    path.write_bytes(content)
    assert kept(path) == NOTHING
    keep(path, learnt())
    assert kept(path)["step_ms"] == pytest.approx(21.0)


def test_a_folder_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    file = EstimatesFile(tmp_path / "file" / "estimates.json", learnt(), "int8")
    file.served(CARD)
    with caplog.at_level(logging.WARNING):
        file.write()
        file.write()
    assert len(caplog.records) <= 1  # `served` may have told
    file = EstimatesFile(tmp_path, learnt(), "int8")  # which is a folder
    caplog.clear()
    file.served(CARD)
    file.write()
    assert len(caplog.records) == 1
    assert os.listdir(tmp_path) == ["file"]


def test_where_it_is() -> None:
    state = {"STATE_DIRECTORY": "/var/lib/edge:/var/lib/more", "PICOSPEC_HOME": "/srv/picospec"}
    assert place("auto", state) == Path("/var/lib/edge/estimates.json")
    assert place("auto", {"PICOSPEC_HOME": "/srv/picospec"}) == Path("/srv/picospec/estimates.json")
    assert place("auto", {}) == Path.home() / ".cache/picospec/estimates.json"
    assert place("/srv/edge.json", state) == Path("/srv/edge.json")
    assert place("off", state) is None


@pytest.mark.parametrize(("mode", "keeps"), [("auto", True), ("split", False), ("coupled", False)])
def test_an_edge_with_fixed_settings_keeps_none(mode: str, keeps: bool) -> None:
    config = edge_config.read(["--drafter.model", "draft", "--speculation.mode", mode], {})
    assert (estimates_place(config) is not None) is keeps


def test_a_drafter_is_known_by_its_files_not_by_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights")
    before = drafter_identity(DrafterSpec("onnx", str(folder)))
    moved = folder.rename(tmp_path / "moved")
    assert drafter_identity(DrafterSpec("onnx", str(moved))) == before
    (moved / "model.onnx").write_bytes(b"other weights")
    assert drafter_identity(DrafterSpec("onnx", str(moved))) != before
    assert drafter_identity(DrafterSpec("ngram", "")) != before
