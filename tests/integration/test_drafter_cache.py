"""The real drafter over many turns: what it keeps, what it computes again, whom it slows.

With the int4 model that `picospec prepare` makes, on one thread.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest

from edge_agent.drafting import drafter, onnx
from edge_agent.drafting.drafter import PREFILL_CHUNK, LogitsArray, ModelDrafter
from edge_agent.drafting.messages import ContextSpec, DrafterSpec, DraftEvent, OpenContext
from edge_agent.drafting.worker import DraftWorker
from picospec.protocol.drafting import Allow, Drafted, Rollback
from picospec.protocol.messages import TokenArray
from tests.support.builders import COUPLED, GREEDY, make_context_spec
from tests.support.machine import model_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WIDTH = 49152
LOGITS_TOLERANCE = 0.15  # of a probability: int4's kernels differ between one token and many


def load(cache_bytes: int = 1 << 30) -> ModelDrafter:
    loaded = drafter.load(
        DrafterSpec("onnx", str(model_folder("draft-int4")), cache_bytes=cache_bytes)
    )
    assert isinstance(loaded, ModelDrafter)
    return loaded


def text_of(length: int, seed: int) -> TokenArray:
    return np.random.default_rng(seed).integers(100, 40_000, length).astype(np.int32)


def spec_of(text: TokenArray) -> ContextSpec:
    return make_context_spec(token_ids=text.tolist(), sampling=GREEDY, mode=COUPLED)


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward took."""
    counts: list[int] = []
    forward = onnx.OnnxRuntime.forward

    def counting(self: onnx.OnnxRuntime, token_ids: TokenArray) -> LogitsArray:
        counts.append(len(token_ids))
        return forward(self, token_ids)

    monkeypatch.setattr(onnx.OnnxRuntime, "forward", counting)
    return counts


MANY_CHATS = """
import json, sys
from pathlib import Path
import numpy as np
from edge_agent.drafting.drafter import load
from edge_agent.drafting.messages import CloseContext, ContextFailed, DrafterSpec, OpenContext
from edge_agent.drafting.worker import DraftWorker
from tests.support.builders import make_context_spec

NUM_CHATS, PROMPT, DRAFTS, AT_ONCE = 200, 40, 3, 4
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
loaded = load(DrafterSpec("onnx", sys.argv[1], cache_bytes=int(sys.argv[2])))
failed = []

def emit(chat, event):
    if isinstance(event, ContextFailed):
        failed.append(event)

worker = DraftWorker(loaded, emit)
most, taken, before = 0, [], 0
for chat in range(NUM_CHATS):
    text = np.random.default_rng(chat).integers(100, 40_000, PROMPT)
    spec = make_context_spec(token_ids=text.tolist())
    worker.handle(chat, OpenContext(spec, PROMPT, limit=PROMPT + DRAFTS))
    while worker.runnable:
        worker.step()
        most = max(most, loaded.store.num_bytes)
    worker.handle(chat - AT_ONCE, CloseContext())
    if chat == AT_ONCE:  # what the runtime takes for itself, it has taken
        before = resident() - loaded.store.num_bytes
    elif chat > AT_ONCE:
        taken.append(resident() - before)
print(json.dumps({"most": most, "taken": max(taken), "last": taken[-1], "failed": len(failed)}))
"""


def test_200_chats_stay_within_the_bound() -> None:
    """In a process of its own, whose memory is looked at: the model's is left out."""
    bound = 40 << 20  # two dozen of the chats
    done = subprocess.run(
        [sys.executable, "-c", MANY_CHATS, str(model_folder("draft-int4")), str(bound)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["failed"] == 0
    assert 0.8 * bound < found["most"] <= bound
    assert 0.8 * bound < found["last"]
    assert found["taken"] < 1.2 * bound, found


def test_a_third_turn_prefills_what_is_new(forwarded: list[int]) -> None:
    model, text = load(), text_of(3_000, seed=1)
    for turn, (start, end) in enumerate(((0, 1_200), (1_200, 2_900), (2_900, 3_000))):
        del forwarded[:]
        context = model.open(spec_of(text[:end]))
        assert context.propose() is not None
        # The last token that was committed is computed again, for its logits.
        assert sum(forwarded) <= end - start + 1, turn
        assert max(forwarded) <= PREFILL_CHUNK
        context.close()


@pytest.mark.parametrize(
    ("shared", "length"),
    [(64, 100), (64, 400)],
    ids=["the other chat's cache is taken over", "a part of it is copied"],
)
def test_a_context_found_by_its_prefix_is_a_fresh_one(
    shared: int, length: int, forwarded: list[int]
) -> None:
    """Bit for bit, where both compute the rest in the same pieces."""
    text = text_of(length, seed=2)
    text[:shared] = text_of(shared, seed=3)
    wanted = np.concatenate([text[:shared], text_of(50, seed=4)])
    fresh = load().open(spec_of(wanted))
    law = fresh.propose()

    model = load()
    other = model.open(spec_of(text))
    other_law = other.propose()
    other.close()
    del forwarded[:]
    found = model.open(spec_of(wanted))
    found_law = found.propose()
    assert sum(forwarded) == len(wanted) - shared
    assert law is not None
    assert found_law is not None
    assert np.array_equal(found_law.probs, law.probs)
    assert found.confidence() == fresh.confidence()
    # A cache that was copied is nobody else's.
    again_law = model.open(spec_of(text)).propose()
    assert again_law is not None
    assert other_law is not None
    assert np.abs(again_law.probs - other_law.probs).max() < LOGITS_TOLERANCE


def test_the_next_turn_of_an_answer_drafts_what_a_fresh_context_does(forwarded: list[int]) -> None:
    """Its answer was computed token by token, which rounds differently."""
    model, prompt, question = load(), text_of(200, seed=5), text_of(30, seed=6)
    warm = make_context_spec(token_ids=prompt.tolist(), mode=COUPLED)
    context = model.open(warm)
    for _ in range(40):
        law = context.propose()
        assert law is not None
        assert law.token_ids is not None or len(law.probs) == WIDTH
        context.append(int(law.probs.argmax() if law.token_ids is None else law.token_ids[0]))
    answer = context.cache.token_ids[len(prompt) :].copy()
    context.rollback(len(context))  # all of it is committed
    context.close()
    turn = np.concatenate([prompt, answer, question])
    del forwarded[:]
    found = model.open(make_context_spec(token_ids=turn.tolist(), mode=COUPLED)).propose()
    assert sum(forwarded) <= len(question) + 2
    fresh = load().open(make_context_spec(token_ids=turn.tolist(), mode=COUPLED)).propose()
    assert found is not None
    assert fresh is not None
    assert np.abs(found.probs - fresh.probs).max() < LOGITS_TOLERANCE


def test_a_chat_beside_a_long_prefill_keeps_half_of_its_pace() -> None:
    """Alternately with and without the prefill, at the same length of context; the median."""
    chat, long, length, count = 0, 1, 200, 60
    num_drafted = [0, 0]

    def emit(context_id: int, event: DraftEvent) -> None:
        num_drafted[context_id] += isinstance(event, Drafted)

    worker = DraftWorker(load(), emit)
    worker.handle(chat, OpenContext(spec_of(text_of(length, seed=7)), length))
    worker.handle(long, OpenContext(spec_of(text_of(4_000, seed=8)), 4_000))
    branches = itertools.count(1)

    def seconds_for_drafts() -> float:
        worker.handle(chat, Rollback(branch=next(branches), length=length, token_ids=()))
        worker.handle(chat, Allow(length + count))
        end = num_drafted[chat] + count
        started_s = time.perf_counter()
        while num_drafted[chat] < end:
            worker.step()
        return time.perf_counter() - started_s

    seconds_for_drafts()
    ratios: list[float] = []
    while True:
        worker.handle(long, Allow(4_001))
        for _ in range(6):  # on with the prefill, so that all of its lengths are seen
            worker.step()
        beside_s = seconds_for_drafts()
        if num_drafted[long]:
            break  # the prefill has come to its end
        worker.handle(long, Allow(0))
        ratios.append(seconds_for_drafts() / beside_s)
    print(f"pace beside a prefill: {[round(ratio, 2) for ratio in ratios]}")
    assert len(ratios) > 8
    assert statistics.median(ratios) > 0.5, ratios
