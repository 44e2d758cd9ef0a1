"""The worker's rules, without a process: branches, limits, turns, laws, failures."""

from __future__ import annotations

import dataclasses
import doctest
import time

import numpy as np
import pytest

from edge_agent.drafting import drafter, store, worker
from edge_agent.drafting.messages import (
    CloseContext,
    ContextFailed,
    ContextSpec,
    DrafterSpec,
    OpenContext,
)
from edge_agent.drafting.scripted import ScriptedDrafter, pseudo_model, sequence
from picospec.errors import DrafterFailed
from picospec.protocol.drafting import Allow, Drafted, Exhausted, Paused, Rollback
from picospec.protocol.messages import SamplingParams, VerificationMode
from picospec.sampling.distribution import draw, process
from picospec.sampling.noise import Purpose

WIDTH = 16
MODEL = pseudo_model(WIDTH)


def context_spec(
    mode=VerificationMode.SPLIT, token_ids=(1, 2, 3), stop=(), **params
) -> ContextSpec:
    sampling_params = SamplingParams(**({"seed": 7} | params))
    ids = np.array(token_ids, np.int32)
    return ContextSpec("r", ids, sampling_params, mode, stop, len(ids))


class Harness:
    """A DraftWorker and what it emitted."""

    def __init__(self, script) -> None:
        self.drafter = ScriptedDrafter(script, WIDTH)
        self.events: list = []  # (context id, event)
        self.worker = worker.DraftWorker(self.drafter, lambda *event: self.events.append(event))

    def open(self, context_id: int, spec: ContextSpec, limit: int) -> None:
        self.worker.handle(context_id, OpenContext(spec, len(spec.token_ids)))
        self.worker.handle(context_id, Allow(limit))

    def run(self) -> list:
        """Steps until nothing is runnable; the events since the last call."""
        for _ in range(1000):
            if not self.worker.runnable:
                break
            self.worker.step()
        assert not self.worker.runnable
        events, self.events = self.events, []
        return [event for _, event in events]


def expected_law(text, params):
    """Truncated, as it goes out with a draft."""
    logits = MODEL(np.array(text))
    return process(logits, worker.proposal(params), np.array(text[:3]), np.array(text[3:]))


def plain(event):
    """`event`, to be compared: laws hold arrays."""
    if not isinstance(event, Drafted):
        return event
    laws = tuple((law.token_ids.tolist(), law.probs.tolist()) for law in event.laws)
    return (event.branch, event.position, event.token_ids, laws)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"top_k": 3, "presence_penalty": 1}])
def test_split_draft_follows_its_law_and_brings_it_along(params):
    harness, spec = Harness(MODEL), context_spec(**params)
    harness.open(0, spec, limit=9)
    text = [1, 2, 3]
    events = harness.run()
    assert len(events) == 6
    for event in events:
        law = expected_law(text, spec.sampling)
        token_id = draw(law, 7, len(text), Purpose.DRAFT)
        assert plain(event) == plain(Drafted(0, len(text), token_ids=(token_id,), laws=(law,)))
        text.append(token_id)


def test_coupled_draft_runs_the_shared_race_and_brings_no_law():
    harness, spec = Harness(MODEL), context_spec(VerificationMode.COUPLED)
    harness.open(0, spec, limit=8)
    text = [1, 2, 3]
    for event in harness.run():
        token_id = draw(expected_law(text, spec.sampling), 7, len(text), Purpose.COUPLED)
        assert event == Drafted(branch=0, position=len(text), token_ids=(token_id,))
        text.append(token_id)
    assert len(text) == 8


def test_contexts_take_turns():
    harness = Harness(MODEL)
    for context_id in range(5):
        harness.open(context_id, context_spec(seed=context_id), limit=13)
    for _ in range(25):
        harness.worker.step()
    drafts = [context_id for context_id, _ in harness.events]
    assert all(drafts.count(context_id) >= 2 for context_id in range(5))


def test_a_long_prompt_takes_half_of_the_time_at_most():
    class Slow(ScriptedDrafter):
        def open(self, spec, num_committed=-1):
            context = super().open(spec, num_committed)
            if spec.request_id == "long":
                context.prefill = lambda: time.sleep(0.008) or True
            else:
                propose = context.propose
                context.propose = lambda: time.sleep(0.001) or propose()
            return context

    events = []
    drafting = worker.DraftWorker(Slow(MODEL, WIDTH), lambda *event: events.append(event))
    specs = [dataclasses.replace(context_spec(), request_id=name) for name in ("long", "short")]
    for context_id, spec in enumerate(specs):
        drafting.handle(context_id, OpenContext(spec, 3, limit=10_000))
    turns = 0
    while len(events) < 100:
        drafting.step()
        turns += 1
    assert turns - len(events) <= 40  # pieces of 8 ms beside 100 drafts of 1 ms


def test_rollback_at_any_moment_continues_as_a_fresh_context_would():
    for drafted in range(8):
        for back in range(drafted + 1):
            harness, spec = Harness(MODEL), context_spec()
            harness.open(0, spec, limit=3 + drafted)
            chain = [event.token_ids[0] for event in harness.run()]
            harness.worker.handle(0, Rollback(branch=1, length=3 + back, token_ids=(5,)))
            harness.worker.handle(0, Allow(12))
            fresh = Harness(MODEL)
            committed = np.array([1, 2, 3, *chain[:back], 5], np.int32)
            fresh.worker.handle(
                0,
                OpenContext(
                    ContextSpec("r", committed, spec.sampling, spec.mode, (), 3),
                    len(committed),
                    branch=1,
                    limit=12,
                ),
            )
            assert [*map(plain, harness.run())] == [*map(plain, fresh.run())]


def test_stop_token_and_the_script_s_end_exhaust_until_a_rollback():
    harness = Harness(sequence([4, 5, 6, 7], start=3))
    harness.open(0, context_spec(VerificationMode.COUPLED, stop=(5,)), limit=20)
    assert harness.run() == [
        Drafted(branch=0, position=3, token_ids=(4,)),
        Drafted(branch=0, position=4, token_ids=(5,)),
        Exhausted(0, 5),
    ]
    harness.worker.handle(0, Allow(30))
    assert harness.run() == []
    harness.worker.handle(0, Rollback(branch=1, length=4, token_ids=(9,)))
    events = harness.run()
    assert events == [
        Drafted(branch=1, position=5, token_ids=(6,)),
        Drafted(branch=1, position=6, token_ids=(7,)),
        Exhausted(1, 7),
    ]


def test_a_law_that_goes_out_is_short():
    logits = np.linspace(0.0, -40.0, 5000).astype(np.float32)
    harness = Harness(lambda text: logits)
    harness.open(0, context_spec(), limit=6)
    for event in harness.run():
        [law] = event.laws
        assert event.token_ids[0] in law.token_ids
        assert len(law.probs) <= worker.PROPOSAL_TOKENS_MAX
        assert law.probs.sum() == pytest.approx(1.0)
        assert law.probs.min() >= 0.99 * worker.PROPOSAL_MIN_P * law.probs.max()


def test_a_turn_that_prefills_tells_no_pace():
    class Slow(ScriptedDrafter):
        def open(self, spec, num_committed=-1):
            context = super().open(spec, num_committed)
            chunks = iter([True, True])
            context.prefill = lambda: next(chunks, False)
            return context

    drafting = worker.DraftWorker(Slow(MODEL, WIDTH), lambda *event: None)
    drafting.handle(0, OpenContext(context_spec(), 3))
    drafting.handle(0, Allow(9))
    told = []
    for _ in range(5):
        drafting.step()
        told.append(drafting.shows_pace)
    assert told == [False, False, False, True, True]


def test_a_failing_context_ends_alone():
    def script(text):
        if text[0] == 9:
            raise RuntimeError("bad text")
        return MODEL(text)

    harness = Harness(script)
    harness.open(0, context_spec(token_ids=(9,)), limit=5)
    harness.open(1, context_spec(), limit=5)
    events = harness.run()
    failed = [event for event in events if isinstance(event, ContextFailed)]
    assert len(failed) == 1
    assert "bad text" in str(failed[0].error)
    assert sum(isinstance(event, Drafted) for event in events) == 2
    harness.worker.handle(1, Rollback(1, 99))  # beyond the text: our own bug, that chat's end
    assert [type(event) for event in harness.run()] == [ContextFailed]
    assert [context.closed for context in harness.drafter.contexts] == [True, True]


def test_closed_contexts_are_freed_and_late_commands_ignored():
    harness = Harness(MODEL)
    harness.open(0, context_spec(), limit=9)
    harness.worker.step()
    harness.worker.handle(0, CloseContext())
    assert not harness.worker.runnable
    for command in (Allow(20), Rollback(1, 3), CloseContext()):
        harness.worker.handle(0, command)
    assert len(harness.events) == 1
    assert harness.drafter.contexts[0].closed


class CountingRuntime:
    """A KVRuntime over a plain list that checks what the cache tells it."""

    def __init__(self):
        self.held, self.forwards, self.closed = [], [], False

    def forward(self, token_ids):
        assert 1 <= len(token_ids) <= drafter.PREFILL_CHUNK
        self.held += token_ids.tolist()
        self.forwards.append(len(token_ids))
        return MODEL(np.array(self.held))

    def truncate(self, length):
        assert length <= len(self.held)
        del self.held[length:]

    def fork(self, length):
        other = CountingRuntime()
        other.held = self.held[:length]
        return other

    @property
    def num_bytes(self):
        return 10 * len(self.held)

    def close(self):
        self.closed = True


class Model:
    """A ModelDrafter, and the runtimes that it has opened."""

    def __init__(self, max_length=10_000, cache_bytes=0):
        self.runtimes = []

        def open_runtime():
            self.runtimes.append(CountingRuntime())
            return self.runtimes[-1]

        self.drafter = drafter.ModelDrafter(
            open_runtime, logits_width=WIDTH, context_length=max_length, cache_bytes=cache_bytes
        )
        self.open = self.drafter.open


def draft(context, num_tokens):
    """Greedy drafts."""
    for _ in range(num_tokens):
        context.append(int(context.propose().probs.argmax()))


def test_model_context_is_lazy_and_prefills_in_chunks():
    model = Model()
    context = model.open(context_spec(token_ids=[1] * 71))
    assert not model.runtimes
    while context.prefill():
        pass
    first = context.propose()
    [runtime] = model.runtimes
    assert runtime.forwards == [32, 32, 6, 1]
    context.append(5)
    context.append(6)
    assert len(runtime.forwards) == 4
    context.propose()
    context.rollback(71)
    again = context.propose()  # its logits are gone: one token runs again
    assert runtime.forwards == [32, 32, 6, 1, 1, 1, 1]
    assert np.array_equal(first.probs, again.probs)


def test_in_split_mode_news_before_the_prefill_changes_no_batch():
    """Numerics hang on how tokens are batched, and a seed's drafts must not on what came when."""

    def forwards(*moments):
        model = Model()
        context = model.open(context_spec(token_ids=[1] * 38))
        for moment in moments:
            if moment == "propose":
                context.propose()
            else:
                context.rollback(*moment)
        context.propose()
        return model.runtimes[0].forwards

    early = forwards((38, (4,)), (39, (5,)))
    late = forwards("propose", (38, (4,)), "propose", (39, (5,)))
    assert early == late == [32, 5, 1, 1, 1]


def test_in_coupled_mode_the_clouds_tokens_are_caught_up_with_at_once():
    model = Model()
    context = model.open(context_spec(VerificationMode.COUPLED, token_ids=[1] * 20))
    context.propose()
    context.rollback(20, (4, 5, 6))
    context.propose()
    assert model.runtimes[0].forwards[-1] == 3


def test_the_next_turn_of_a_chat_prefills_what_is_new():
    model = Model()
    text = [1 + n % 9 for n in range(100)]
    context = model.open(context_spec(token_ids=text))
    draft(context, 5)
    context.rollback(103, (7, 8))  # three drafts were right, then the cloud's own tokens
    context.propose()
    answer = context.cache.token_ids.tolist()
    context.close()
    again = model.open(context_spec(token_ids=[*answer, 2, 3, 4, 5]))
    [runtime] = model.runtimes
    before = len(runtime.forwards)
    again.propose()
    assert model.runtimes == [runtime]
    assert sum(runtime.forwards[before:]) == 4
    assert runtime.held == [*answer, 2, 3, 4, 5]


def test_what_was_drafted_and_not_committed_is_not_kept():
    model = Model()
    context = model.open(context_spec(token_ids=[1] * 20))
    draft(context, 4)
    context.close()
    assert model.runtimes[0].held == [1] * 20


def test_the_longest_common_prefix_is_found_and_nobody_shares_one():
    model = Model()
    alike = [1] * 20  # the same system prompt
    for tail in ([2] * 40, [3] * 40):
        context = model.open(context_spec(token_ids=alike + tail))
        context.propose()
        context.close()
    chats = [model.open(context_spec(token_ids=alike + [t] * 40 + [4])) for t in (2, 3, 3)]
    before = [sum(runtime.forwards) for runtime in model.runtimes]
    for context in chats:
        context.propose()
    texts = [context.cache.token_ids.tolist() for context in chats]
    held = [runtime.held for runtime in model.runtimes]
    assert texts[0] in held
    # Of the first and the second chat only the last token was computed.
    assert sum(model.runtimes[0].forwards) == before[0] + 1
    assert len({id(context) for context in chats}) == 3


def test_caches_stay_within_their_bound():
    model = Model(cache_bytes=2000)
    for chat in range(200):
        context = model.open(
            context_spec(token_ids=[2 + chat % 13] * (20 + chat % 7) + [chat % 15])
        )
        draft(context, 3)
        assert model.drafter.store.num_bytes <= 2000 + 300  # but for what is in use
        context.close()
        assert model.drafter.store.num_bytes <= 2000
    assert sum(not runtime.closed for runtime in model.runtimes) > 3


def test_a_context_ends_at_the_models_length():
    model = Model(max_length=40)
    context = model.open(context_spec())
    while (law := context.propose()) is not None:
        context.append(draw(law, 0, len(context), Purpose.DRAFT))
    assert len(context) == 41


def test_the_store_by_example():
    found = doctest.testmod(store, extraglobs={"FakeRuntime": CountingRuntime, "np": np})
    assert found.failed == 0


def test_ids_and_logits_of_another_width_fit():
    spec = context_spec(token_ids=[1, 2, 30])
    for width in (8, WIDTH, 40):
        wide = ContextSpec("r", spec.token_ids, spec.sampling, spec.mode, (), 3, logits_width=width)
        model = Model()
        law = model.open(wide).propose()
        assert len(law.probs) == width
        assert law.probs.sum() == pytest.approx(1.0)
        assert model.runtimes[0].held == [1, 2, WIDTH - 1]


def test_unloadable_drafters_say_why(tmp_path):
    for backend, words in [
        ("onnx", "picospec prepare"),
        ("scripted", "cannot load"),
        ("llama", "unknown drafter backend"),
    ]:
        with pytest.raises(DrafterFailed, match=words):
            drafter.load(DrafterSpec(backend, str(tmp_path)))


def test_an_unsure_drafter_pauses_until_it_is_allowed_on() -> None:
    harness = Harness(MODEL)
    spec = dataclasses.replace(context_spec(), confidence_stop=0.999)
    harness.open(1, spec, limit=20)
    assert [type(event) for event in harness.run()] == [Drafted, Paused]
    harness.worker.handle(1, Allow(20))
    drafted, paused = harness.run()
    assert (drafted.position, paused) == (4, Paused(0, 5))
    harness.worker.handle(1, Rollback(branch=1, length=4, token_ids=(9,)))
    assert [type(event) for event in harness.run()] == [Drafted, Paused]


def test_a_sure_drafter_goes_on() -> None:
    harness = Harness(sequence([5, 6, 7], 3))
    harness.open(1, dataclasses.replace(context_spec(), confidence_stop=0.999), limit=6)
    assert [type(event) for event in harness.run()] == [Drafted] * 3


def test_confidence_is_the_models_own_whatever_the_temperature() -> None:
    """Greedy, the law is certain of every token; the model is not."""
    harness = Harness(MODEL)
    spec = dataclasses.replace(context_spec(temperature=0.0), confidence_stop=0.999)
    harness.open(1, spec, limit=20)
    assert [type(event) for event in harness.run()] == [Drafted, Paused]
