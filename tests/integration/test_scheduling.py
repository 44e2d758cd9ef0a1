"""Who is scheduled, evicted and let back in, by the real scheduler over vLLM's; no forwards."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from cloud_server.engine.engine_session import EngineSession
from picospec.protocol.messages import AssistPolicy
from tests.support.builders import COUPLED, SPLIT
from tests.support.scheduling import BLOCK_SIZE, TOKEN_ID, Edge, SteppedEngine

pytestmark = pytest.mark.engine

NEVER, IDLE, ALWAYS = AssistPolicy.NEVER, AssistPolicy.IDLE, AssistPolicy.ALWAYS


def test_two_evicted_sessions_that_speak_at_once_both_come_back(tiny_model: Path) -> None:
    """vLLM tries the large one first, so it is the large one that needs room."""
    engine = SteppedEngine(tiny_model, num_blocks=24)
    engine.open("small", prompt_tokens=2 * BLOCK_SIZE)
    engine.run()
    engine.open("large", prompt_tokens=12 * BLOCK_SIZE)
    engine.run()
    for index in range(3):
        engine.open(f"other-{index}", prompt_tokens=7 * BLOCK_SIZE)
        engine.run()
    assert engine.stats.evicted_sessions >= 2
    engine.ask("small", "large")
    engine.open("newcomer", prompt_tokens=4 * BLOCK_SIZE)
    engine.run()
    assert engine.edges["small"].committed == engine.edges["large"].committed == 2
    assert engine.edges["newcomer"].committed == 1


def test_sessions_that_fit_are_never_evicted(tiny_model: Path) -> None:
    """To the last block: 11 sessions of 17 blocks speak in turn."""
    engine = SteppedEngine(tiny_model, num_blocks=11 * 17)
    names = [f"s{index}" for index in range(11)]
    for name in names:
        engine.open(name, prompt_tokens=512, max_tokens=32)
    engine.run()
    for _ in range(31):
        for name in names:
            engine.ask(name)
            engine.run()
    assert {edge.committed for edge in engine.edges.values()} == {32}
    assert engine.stats.evicted_sessions == 0
    assert engine.stats.forwarded_tokens == 11 * (512 + 31)


@pytest.mark.parametrize("num_held", [0, 20])
def test_held_sessions_cost_a_step_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, num_held: int
) -> None:
    engine = SteppedEngine(tiny_model, num_blocks=100)
    for index in range(num_held):
        engine.open(f"held-{index}", prompt_tokens=BLOCK_SIZE)
    engine.open("speaks", prompt_tokens=BLOCK_SIZE)
    engine.run()
    assert engine.stats.held_sessions == num_held + 1
    looked_at = Counter[str]()
    edge_waits = vars(EngineSession)["edge_waits"]

    def counting(session: EngineSession) -> bool:
        looked_at[session.request.request_id] += 1
        return bool(edge_waits.fget(session))

    monkeypatch.setattr(EngineSession, "edge_waits", property(counting))
    engine.checks = False  # they look at every session
    engine.ask("speaks")
    engine.run()
    assert engine.edges["speaks"].committed == 2
    assert set(looked_at) == {"speaks"}


@pytest.mark.parametrize("seed", range(8))
def test_no_session_is_forgotten_whatever_happens(tiny_model: Path, seed: int) -> None:
    """Both modes, with and without takeover, memory short: what is ready is known at every step."""
    rng = random.Random(seed)
    engine = SteppedEngine(tiny_model, num_blocks=rng.choice([20, 40, 200]))
    kinds = [(SPLIT, NEVER), (COUPLED, NEVER), (COUPLED, IDLE), (COUPLED, ALWAYS)]
    for number in range(400):
        speakers = [key for key, edge in engine.edges.items() if not edge.waits]
        chance = rng.random()
        if chance < 0.2 and len(engine.edges) < 12:
            mode, assist = rng.choice(kinds)
            engine.open(
                f"s{number}",
                prompt_tokens=rng.randint(1, 250),
                max_tokens=rng.randint(1, 40),
                mode=mode,
                assist=assist,
            )
        elif chance < 0.85 and speakers:
            speak(engine, rng.choice(speakers), rng)
        elif chance < 0.88 and engine.edges:
            engine.abort(rng.choice(list(engine.edges)))
        if rng.random() < 0.7:
            engine.step()
        forget_finished(engine.edges)
    engine.run(steps_max=500)
    forget_finished(engine.edges)
    assert not [key for key, edge in engine.edges.items() if edge.waits]


def speak(engine: SteppedEngine, key: str, rng: random.Random) -> None:
    """One frame of the edge: a probe, or drafts of which most are right."""
    edge = engine.edges[key]
    if edge.mode is COUPLED and rng.random() < 0.3:
        engine.ask(key)
        return
    room = edge.max_tokens - edge.committed - edge.rejected
    fewest = 0 if edge.rejected else 1
    drafts = rng.choices([TOKEN_ID, TOKEN_ID + 1], [3, 1], k=min(rng.randint(fewest, 5), room))
    engine.draft(key, *drafts)


def forget_finished(edges: dict[str, Edge]) -> None:
    for key in [key for key, edge in edges.items() if edge.finished]:
        del edges[key]
