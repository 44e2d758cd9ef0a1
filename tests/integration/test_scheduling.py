"""Who is scheduled, evicted and let back in, by the real scheduler over vLLM's; no forwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.scheduling import BLOCK_SIZE, SteppedEngine

pytestmark = pytest.mark.engine


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
    assert engine.committed["small"] == engine.committed["large"] == 2
    assert engine.committed["newcomer"] == 1


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
    assert set(engine.committed.values()) == {32}
    assert engine.stats.evicted_sessions == 0
    assert engine.forwarded_tokens == 11 * (512 + 31)
