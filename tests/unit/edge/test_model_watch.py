from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from edge_agent.model_watch import ModelWatch
from picospec.errors import CloudUnavailable, ModelMismatch
from picospec.protocol.messages import ModelCard
from tests.support.edge_api import CARD, eventually


class Cloud:
    """Answers `answer`, or raises it."""

    def __init__(self, answer: ModelCard | Exception) -> None:
        self.answer = answer
        self.asked = 0
        self.reachable: list[bool] = []

    async def get_model(self) -> ModelCard:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def watch(self, timeout_s: float = 1.0) -> ModelWatch:
        return ModelWatch(
            self.get_model,
            refuse_others,
            timeout_s=timeout_s,
            poll_interval_s=0.01,
            on_reachable=self.reachable.append,
        )


def refuse_others(card: ModelCard) -> None:
    if card.model_id != CARD.model_id:
        raise ModelMismatch("they differ in tokenizer.json")


async def test_before_the_first_answer_nothing_is_served() -> None:
    cloud = Cloud(CloudUnavailable("connection refused"))
    watch = cloud.watch()
    with pytest.raises(CloudUnavailable):
        watch.card()
    await watch.ask()
    with pytest.raises(CloudUnavailable, match="connection refused"):
        watch.card()
    assert (watch.reachable, watch.model_id) == (False, None)
    cloud.answer = CARD
    await watch.ask()
    assert watch.card() == CARD
    assert (watch.reachable, watch.problem) == (True, "")
    assert cloud.reachable == [False, True]


async def test_an_outage_keeps_the_card_and_shows_in_health() -> None:
    cloud = Cloud(CARD)
    watch = cloud.watch()
    await watch.ask()
    cloud.answer = CloudUnavailable("gone")
    await watch.ask()
    assert watch.card() == CARD
    assert (watch.reachable, watch.problem) == (False, "gone")


async def test_a_wrong_pair_is_refused_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    cloud = Cloud(replace(CARD, model_id="other"))
    watch = cloud.watch()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await watch.ask()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "tokenizer.json" in caplog.text
    assert (watch.reachable, watch.model_id) == (True, "other")
    with pytest.raises(ModelMismatch, match=r"tokenizer\.json"):
        watch.card()
    cloud.answer = CARD
    await watch.ask()
    assert watch.card() == CARD


async def test_an_answer_that_does_not_come_is_an_outage() -> None:
    cloud = Cloud(CARD)
    cloud.get_model = asyncio.Event().wait  # type: ignore[assignment, method-assign]
    watch = cloud.watch(timeout_s=0.01)
    await watch.ask()
    assert "within 0.01 s" in watch.problem


async def test_it_keeps_asking() -> None:
    cloud = Cloud(CloudUnavailable("not yet"))
    running = asyncio.ensure_future(cloud.watch().run())
    await eventually(lambda: cloud.asked >= 3)
    cloud.answer = CARD
    asked = cloud.asked
    await eventually(lambda: cloud.asked >= asked + 3 and cloud.reachable[-1])
    running.cancel()
