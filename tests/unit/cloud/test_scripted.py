"""The scripted engine speaks as the real one must."""

from __future__ import annotations

import asyncio
import doctest

from cloud_server.engine import scripted
from cloud_server.engine.interface import EngineEvent, Prefilled, VerificationEngine
from cloud_server.engine.scripted import ScriptedEngine, toy_target
from picospec.protocol.messages import Draft, FinishReason, Verdict, VerificationMode
from tests.support.cloud import an_open


async def events_of(engine: ScriptedEngine, *frames: Draft, **changes: object) -> list[EngineEvent]:
    events: list[EngineEvent] = []
    await engine.start()
    await engine.open("s1", an_open(**changes), events.append)
    for frame in frames:
        await asyncio.sleep(0.01)
        await engine.deliver("s1", frame, 0.0)
    await asyncio.sleep(0.01)
    return events


def test_it_is_a_verification_engine() -> None:
    engine: VerificationEngine = ScriptedEngine()
    assert not engine.healthy
    assert doctest.testmod(scripted).failed == 0


async def test_coupled_accepts_then_goes_on() -> None:
    tokens = [3, 1, 4]
    for _ in range(4):
        tokens.append(toy_target(tokens))
    good = tuple(tokens[4:6])
    events = await events_of(ScriptedEngine(), Draft(epoch=0, base_position=4, token_ids=good))
    assert isinstance(events[0], Prefilled)
    assert events[0].first_position == 3
    assert events[1:] == [
        Verdict(0, 3, token_ids=(tokens[3],), num_forwards=1),
        Verdict(
            epoch=0,
            position=4,
            num_accepted=2,
            token_ids=(tokens[6],),
            num_draft_tokens=2,
            num_forwards=1,
        ),
    ]


async def test_split_rejects_and_recovers() -> None:
    tokens = [3, 1, 4]
    for _ in range(3):
        tokens.append(toy_target(tokens))
    wrong = tokens[4] % 63 + 1
    events = await events_of(
        ScriptedEngine(),
        Draft(epoch=0, base_position=4, token_ids=(wrong,), draft_probs=(0.5,)),
        Draft(
            epoch=1,
            base_position=4,
            token_ids=(tokens[4], tokens[5]),
            draft_probs=(0.5,),
            num_forced=1,
        ),
        mode=VerificationMode.SPLIT,
        max_tokens=3,
    )
    rejected, last = events[2:]
    assert isinstance(rejected, Verdict)
    assert rejected.rejection is not None
    assert rejected.rejection.token_ids.tolist() == [tokens[4]]
    assert last == Verdict(
        epoch=1,
        position=5,
        num_accepted=1,
        finish_reason=FinishReason.LENGTH,
        num_draft_tokens=1,
        num_forwards=1,
    )


async def test_split_answers_a_probe_of_the_open() -> None:
    events = await events_of(ScriptedEngine(), mode=VerificationMode.SPLIT, probe=2)
    assert isinstance(events[1], Verdict)
    assert events[1].rejection is not None


async def test_aborted_sessions_are_silent() -> None:
    engine = ScriptedEngine(step_s=0.005)
    events: list[EngineEvent] = []
    await engine.start()
    await engine.open("s1", an_open(), events.append)
    await engine.abort("s1")
    await engine.abort("s1")
    await engine.deliver("s1", Draft(epoch=0, base_position=4, token_ids=(1,)), 0.0)
    await asyncio.sleep(0.02)
    assert events == []
    assert engine.sessions == 0
