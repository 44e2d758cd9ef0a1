"""When drafts go to the engine, and how many messages they take."""

from __future__ import annotations

import asyncio
import time

from cloud_server.engine.deliveries import Deliveries
from cloud_server.engine.envelope import Delivery
from picospec.protocol.messages import Draft

STEP_S = 0.1


class Engine:
    """Takes messages."""

    def __init__(self) -> None:
        self.messages: list[list[str]] = []
        self.deliveries = Deliveries(self.take)

    async def take(self, message: list[Delivery]) -> None:
        self.messages.append([delivery.session_key for delivery in message])

    def add(self, session_key: str) -> None:
        draft = Draft(epoch=0, base_position=3, token_ids=(7,))
        self.deliveries.add(Delivery(session_key, draft, time.monotonic()))


async def test_an_engine_without_a_step_gets_drafts_at_once() -> None:
    engine = Engine()
    engine.add("a")
    engine.add("b")  # in the same turn of the loop
    await asyncio.sleep(0.0)
    assert engine.messages == [["a", "b"]]


async def test_the_drafts_of_a_step_are_one_message_before_it_ends() -> None:
    engine = Engine()
    engine.deliveries.step_ends(time.monotonic() + STEP_S)
    for session_key in "abc":
        engine.add(session_key)
        await asyncio.sleep(0.0)
    assert not engine.messages
    await asyncio.sleep(STEP_S)
    assert engine.messages == [["a", "b", "c"]]
    engine.add("d")  # too late to wait for others
    await asyncio.sleep(0.0)
    assert engine.messages[1:] == [["d"]]


async def test_a_step_that_ends_early_lets_go_of_what_waits() -> None:
    engine = Engine()
    engine.deliveries.step_ends(time.monotonic() + 60.0)
    engine.add("a")
    await asyncio.sleep(0.0)
    assert not engine.messages
    engine.deliveries.step_ends(0.0)
    await asyncio.sleep(0.0)
    assert engine.messages == [["a"]]


async def test_nothing_is_sent_after_the_end() -> None:
    engine = Engine()
    engine.deliveries.step_ends(time.monotonic() + STEP_S / 10)
    engine.add("a")
    engine.deliveries.close()
    await asyncio.sleep(STEP_S / 5)
    assert not engine.messages
