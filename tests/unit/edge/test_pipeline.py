"""The pipeline with a drafter and a cloud in memory: the answer, resumption, and the clean end."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_agent import pipeline, resume
from edge_agent.drafting.messages import ContextFailed
from edge_agent.drafting.scripted import ScriptedDrafting
from edge_agent.generation import GenerationChunk, GenerationRequest
from edge_agent.link import ScriptedLink, ScriptedStream
from edge_agent.observer import NullObserver
from edge_agent.pipeline import SpeculationPolicy, SpeculativeGenerator
from picospec.errors import (
    CapacityError,
    CloudUnavailable,
    DrafterFailed,
    PicoSpecError,
    RemoteOrderError,
)
from picospec.protocol.messages import (
    AssistPolicy,
    EdgeFrame,
    Finish,
    FinishReason,
    ModelCard,
    Open,
    Opened,
    SamplingParams,
    Verdict,
    VerificationMode,
)
from tests.sim.toy import Language, context_of, decode
from tests.sim.world import Cloud, Faults, Scenario, Times
from tests.support.builders import COUPLED, SPLIT, make_card

VOCAB, PROMPT = 16, (1, 2, 3)
LANGUAGE = Language(VOCAB, 3, 0.8, SamplingParams())
GREEDY = Language(VOCAB, 3, 0.8, SamplingParams(temperature=0.0))
CARD = make_card(logits_width=VOCAB, eos_token_ids=(), max_model_len=512)


class LoopClock:
    """The event loop as the simulated cloud's clock."""

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def at(self, time: float, call: Callable[..., None], *args: Any) -> None:
        asyncio.get_running_loop().call_at(time, call, *args)


class ToyCloud:
    """The simulation's cloud behind a ScriptedLink; `faults` are raised by streams in turn.

    A fault is (verdicts before it, error); a stream without one works to the end.
    """

    def __init__(
        self,
        language: Language,
        seed: int,
        faults: list[tuple[int, PicoSpecError]] | None = None,
        *,
        goes_on: bool = False,
    ) -> None:
        """`goes_on`: it decodes alone wherever the edge lets it."""
        self.scenario = Scenario(
            language,
            SpeculationPolicy(),
            PROMPT,
            seed,
            max_tokens=0,
            times=Times(step=0.0005, prefill=0.001),
            over_the_wire=False,
        )
        self.faults = Faults(take_over=float(goes_on))
        self.card = CARD
        self.clock = LoopClock()
        self.rng = random.Random(seed)
        self.link = ScriptedLink(self.answer)
        self.clouds: dict[int, Cloud] = {}
        self._faults = iter(faults or [])

    def chance(self, rate: float) -> bool:
        return rate == 1.0

    def vary(self, delay: float) -> float:
        return delay

    def answer(self, stream: ScriptedStream, frame: EdgeFrame) -> None:
        if isinstance(frame, Open):
            down = _Down(stream, next(self._faults, None))
            self.clouds[id(stream)] = Cloud(self, down)  # type: ignore[arg-type]
        self.clouds[id(stream)].receive(frame)


class _Down:
    """The way back of one stream."""

    def __init__(self, stream: ScriptedStream, fault: tuple[int, PicoSpecError] | None) -> None:
        self._stream = stream
        self._fault = fault
        self._num_verdicts = 0
        if fault is not None and fault[0] < 0:  # not even opened
            stream.feed(fault[1])

    def down(self, frame: Opened | Verdict) -> None:
        if self._fault is not None:
            if self._num_verdicts >= self._fault[0]:
                self._stream.feed(self._fault[1])
                return
            self._num_verdicts += isinstance(frame, Verdict)
        self._stream.feed(frame)
        if isinstance(frame, Verdict) and frame.finish_reason is not None:
            self._stream.feed(None)


class Recorder(NullObserver):
    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.started = self.resumes = self.stale_tokens = 0
        self.round_trips: list[float] = []

    def generation_started(self) -> None:
        self.started += 1

    def generation_finished(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def round_trip(self, seconds: float) -> None:
        self.round_trips.append(seconds)

    def resumed(self) -> None:
        self.resumes += 1

    def stale(self, num_tokens: int) -> None:
        self.stale_tokens += num_tokens


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "BACKOFF_FIRST_S", 0.001)


@pytest.fixture
def observer() -> Recorder:
    return Recorder()


@pytest.fixture
async def no_task_left() -> Any:
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    assert not {task for task in asyncio.all_tasks() - before if task.get_name() == "generation"}


def drafter_of(language: Language) -> ScriptedDrafting:
    return ScriptedDrafting(
        lambda text: language.draft_logits(context_of(text.tolist())), logits_width=VOCAB
    )


def request_of(seed: int = 0, max_tokens: int = 40, stop: tuple[int, ...] = ()) -> Any:
    return GenerationRequest(
        request_id="chat-1",
        prompt_token_ids=np.array(PROMPT, np.int32),
        sampling=replace(LANGUAGE.params, seed=seed),
        max_tokens=max_tokens,
        stop_token_ids=stop,
    )


async def collect(generation: Any) -> list[GenerationChunk]:
    async with asyncio.timeout(10):
        return [chunk async for chunk in generation]


def text_of(chunks: list[GenerationChunk]) -> list[int]:
    return list(itertools.chain.from_iterable(chunk.token_ids for chunk in chunks))


def policies() -> Iterator[SpeculationPolicy]:
    for mode, fast, parallel in itertools.product(VerificationMode, (True, False), (True, False)):
        yield SpeculationPolicy(
            mode, draft_length=3, window=8, fast_verify=fast, parallel_draft=parallel
        )

    yield SpeculationPolicy(SPLIT, draft_length=8, fast_verify=False, round_timeout_s=0.001)
    yield SpeculationPolicy(SPLIT, draft_length=3, window=8, confidence_stop=0.5)


@pytest.mark.usefixtures("no_task_left")
@pytest.mark.parametrize("policy", [*policies()], ids=str)
async def test_greedy_answers_are_the_targets_own(
    policy: SpeculationPolicy, observer: Recorder
) -> None:
    cloud, drafting = ToyCloud(GREEDY, 0), drafter_of(GREEDY)
    generator = SpeculativeGenerator(cloud.link, drafting, lambda: CARD, policy, observer)
    generation = generator.generate(replace(request_of(), sampling=GREEDY.params))
    chunks = await collect(generation)
    assert text_of(chunks) == decode(GREEDY, PROMPT, 0, 40, ())
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    stats = generation.stats
    assert stats.output_tokens == 40
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert stats.verdicts < 41
    assert stats.bytes_up > 0
    assert observer.outcomes == ["length"]
    assert drafting.open_contexts == 0
    assert all(stream.closed for stream in cloud.link.streams)


@pytest.mark.usefixtures("no_task_left")
@pytest.mark.parametrize("losses", [[-1], [0], [1], [5], [1, 0, 3, -1, 2]])
@pytest.mark.parametrize("mode", list(VerificationMode))
async def test_a_lost_link_changes_nothing_in_the_answer(
    mode: VerificationMode, losses: list[int], observer: Recorder
) -> None:
    lost = CloudUnavailable("cut")
    cloud = ToyCloud(GREEDY, 0, [(verdicts, lost) for verdicts in losses])
    policy = SpeculationPolicy(mode, resume_attempts=3)
    drafting = drafter_of(GREEDY)
    generator = SpeculativeGenerator(cloud.link, drafting, lambda: CARD, policy, observer)
    generation = generator.generate(replace(request_of(), sampling=GREEDY.params))
    assert text_of(await collect(generation)) == decode(GREEDY, PROMPT, 0, 40, ())
    assert len(cloud.link.streams) == len(losses) + 1
    confirmed = 1 + sum(verdicts > 0 for verdicts in losses[1:])
    assert generation.stats.resumes == observer.resumes == confirmed
    assert all(stream.closed for stream in cloud.link.streams)


async def test_the_clouds_answer_to_finish_is_no_loss(caplog: pytest.LogCaptureFixture) -> None:
    """The edge finishes by itself when it draws the last token; then the cloud ends the stream."""

    class Polite(ToyCloud):
        def answer(self, stream: ScriptedStream, frame: EdgeFrame) -> None:
            super().answer(stream, frame)
            if isinstance(frame, Finish):
                stream.feed(None)

    caplog.set_level("INFO")
    num_finishes = 0
    for seed in range(10):
        cloud = Polite(LANGUAGE, seed)
        generator = SpeculativeGenerator(
            cloud.link, drafter_of(LANGUAGE), lambda: CARD, SpeculationPolicy(SPLIT)
        )
        await collect(generator.generate(request_of(seed, max_tokens=6)))
        [stream] = cloud.link.streams
        num_finishes += isinstance(stream.sent[-1], Finish)
    assert num_finishes
    assert "lost" not in caplog.text


async def test_coupled_text_is_the_targets_for_any_seed() -> None:
    for seed in range(10):
        cloud = ToyCloud(LANGUAGE, seed, [(2, CloudUnavailable("cut"))])
        generator = SpeculativeGenerator(
            cloud.link, drafter_of(LANGUAGE), lambda: CARD, SpeculationPolicy(COUPLED)
        )
        chunks = await collect(generator.generate(request_of(seed, stop=(4,))))
        assert text_of(chunks) == decode(LANGUAGE, PROMPT, seed, 40, (4,))


@pytest.mark.usefixtures("no_task_left")
async def test_several_generations_share_link_and_drafter() -> None:
    drafting = drafter_of(LANGUAGE)
    cloud = ToyCloud(LANGUAGE, 0)
    generator = SpeculativeGenerator(
        cloud.link, drafting, lambda: CARD, SpeculationPolicy(COUPLED, window=4)
    )
    answers = await asyncio.gather(
        *(collect(generator.generate(request_of(seed))) for seed in range(6))
    )
    for seed, chunks in enumerate(answers):
        assert text_of(chunks) == decode(LANGUAGE, PROMPT, seed, 40, ())


@pytest.mark.usefixtures("no_task_left")
@pytest.mark.parametrize("after", [0, 3])
async def test_a_cloud_that_stays_away(after: int, observer: Recorder) -> None:
    away = CloudUnavailable("away", retry_after_s=7.0)
    cloud = ToyCloud(LANGUAGE, 0, [(after or -1, away)] + [(-1, away)] * 20)
    drafting = drafter_of(LANGUAGE)
    policy = SpeculationPolicy(resume_attempts=2)
    generator = SpeculativeGenerator(cloud.link, drafting, lambda: CARD, policy, observer)
    generation = generator.generate(request_of())
    chunks = []

    async def read() -> None:
        async for chunk in generation:
            chunks.append(chunk)

    with pytest.raises(CloudUnavailable) as caught:
        await asyncio.wait_for(read(), 5)
    assert caught.value.retry_after_s == 7.0
    assert bool(chunks) == bool(after)
    assert len(cloud.link.streams) == 3
    assert drafting.open_contexts == 0
    assert observer.outcomes == ["CloudUnavailable"]


async def test_resuming_is_bounded_in_time() -> None:
    away = CloudUnavailable("away")
    cloud = ToyCloud(LANGUAGE, 0, [(-1, away)] * 100)
    policy = SpeculationPolicy(resume_attempts=100, resume_timeout_s=0.02)
    generator = SpeculativeGenerator(cloud.link, drafter_of(LANGUAGE), lambda: CARD, policy)
    with pytest.raises(CloudUnavailable):
        await collect(generator.generate(request_of()))
    assert len(cloud.link.streams) < 10


@pytest.mark.parametrize("error", [CapacityError("full"), RemoteOrderError("no", "draft")])
async def test_refusals_are_not_tried_again(error: PicoSpecError) -> None:
    cloud = ToyCloud(LANGUAGE, 0, [(-1, error)])
    generator = SpeculativeGenerator(
        cloud.link, drafter_of(LANGUAGE), lambda: CARD, SpeculationPolicy()
    )
    with pytest.raises(type(error)):
        await collect(generator.generate(request_of()))
    assert len(cloud.link.streams) == 1


@pytest.mark.usefixtures("no_task_left")
async def test_closing_frees_everything_at_once(observer: Recorder) -> None:
    cloud, drafting = ToyCloud(LANGUAGE, 0), drafter_of(LANGUAGE)
    generator = SpeculativeGenerator(
        cloud.link, drafting, lambda: CARD, SpeculationPolicy(), observer
    )
    generation = generator.generate(request_of(max_tokens=400))
    async for _ in generation:
        break
    await generation.aclose()
    await generation.aclose()
    assert drafting.open_contexts == 0
    assert cloud.link.streams[0].closed
    assert observer.outcomes == ["cancelled"]


@pytest.mark.usefixtures("no_task_left")
async def test_closing_while_a_reader_waits() -> None:
    link, drafting = ScriptedLink(), drafter_of(LANGUAGE)  # a cloud that never answers
    generator = SpeculativeGenerator(link, drafting, lambda: CARD, SpeculationPolicy())
    generation = generator.generate(request_of())
    reader = asyncio.create_task(collect(generation))
    await asyncio.sleep(0.01)
    await generation.aclose()
    assert await reader == []
    assert drafting.open_contexts == 0


@pytest.mark.usefixtures("no_task_left")
async def test_cancelling_the_reader_frees_everything() -> None:
    link, drafting = ScriptedLink(), drafter_of(LANGUAGE)
    generator = SpeculativeGenerator(link, drafting, lambda: CARD, SpeculationPolicy())
    reader = asyncio.create_task(collect(generator.generate(request_of())))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert drafting.open_contexts == 0
    assert link.streams[0].closed


async def test_a_generation_that_was_never_started_closes_quietly(observer: Recorder) -> None:
    generator = SpeculativeGenerator(
        ScriptedLink(), drafter_of(LANGUAGE), lambda: CARD, SpeculationPolicy(), observer
    )
    await generator.generate(request_of()).aclose()
    assert observer.outcomes == []


async def test_failures_before_the_start_reach_the_reader() -> None:
    def no_card() -> ModelCard:
        raise CloudUnavailable("never reached")

    drafting = drafter_of(LANGUAGE)
    generator = SpeculativeGenerator(ScriptedLink(), drafting, no_card, SpeculationPolicy())
    with pytest.raises(CloudUnavailable):
        await collect(generator.generate(request_of()))
    assert drafting.open_contexts == 0


@pytest.mark.usefixtures("no_task_left")
@pytest.mark.parametrize("mode", list(VerificationMode))
@pytest.mark.parametrize("after", [0, 1, 4])
async def test_without_its_drafter_an_answer_goes_on(mode: VerificationMode, after: int) -> None:
    cloud, drafting = ToyCloud(GREEDY, 0, goes_on=True), drafter_of(GREEDY)
    policy = SpeculationPolicy(mode, assist=AssistPolicy.AUTO, window=4)
    generator = SpeculativeGenerator(cloud.link, drafting, lambda: CARD, policy)
    generation = generator.generate(replace(request_of(), sampling=GREEDY.params))
    chunks = []
    async for chunk in generation:
        chunks.append(chunk)
        if len(chunks) == after + 1:
            for context in list(drafting.contexts.values()):
                context.deliver(ContextFailed(DrafterFailed("out of memory")))
    assert text_of(chunks) == decode(GREEDY, PROMPT, 0, 40, ())
    assert drafting.open_contexts == 0


async def test_without_a_free_context_an_answer_goes_on() -> None:
    cloud = ToyCloud(GREEDY, 0, goes_on=True)
    drafting = ScriptedDrafting(lambda text: None, logits_width=VOCAB, max_contexts=0)
    policy = SpeculationPolicy(SPLIT, assist=AssistPolicy.AUTO)
    generator = SpeculativeGenerator(cloud.link, drafting, lambda: CARD, policy)
    chunks = await collect(generator.generate(replace(request_of(), sampling=GREEDY.params)))
    assert text_of(chunks) == decode(GREEDY, PROMPT, 0, 40, ())


@pytest.mark.usefixtures("no_task_left")
async def test_a_drafter_that_fails_ends_a_generation_that_the_cloud_waits_in() -> None:
    link, drafting = ScriptedLink(), drafter_of(LANGUAGE)
    generator = SpeculativeGenerator(link, drafting, lambda: CARD, SpeculationPolicy())
    reader = asyncio.create_task(collect(generator.generate(request_of())))
    await asyncio.sleep(0.01)
    next(iter(drafting.contexts.values())).deliver(ContextFailed(DrafterFailed("died")))
    with pytest.raises(DrafterFailed):
        await reader
    assert link.streams[0].closed


async def test_a_slow_reader_gets_what_has_piled_up() -> None:
    cloud = ToyCloud(GREEDY, 0)
    generator = SpeculativeGenerator(
        cloud.link, drafter_of(GREEDY), lambda: CARD, SpeculationPolicy()
    )
    chunks = []
    async for chunk in generator.generate(replace(request_of(), sampling=GREEDY.params)):
        chunks.append(chunk)
        await asyncio.sleep(0.05)
    assert text_of(chunks) == decode(GREEDY, PROMPT, 0, 40, ())
    assert len(chunks) < 20


async def test_round_trips_are_reported(observer: Recorder) -> None:
    cloud = ToyCloud(GREEDY, 0)
    generator = SpeculativeGenerator(
        cloud.link, drafter_of(GREEDY), lambda: CARD, SpeculationPolicy(), observer
    )
    await collect(generator.generate(replace(request_of(), sampling=GREEDY.params)))
    assert observer.round_trips
    assert all(0 <= seconds < 1 for seconds in observer.round_trips)


@pytest.mark.usefixtures("no_task_left")
async def test_a_reader_cancelled_at_the_very_end_leaves_nothing(
    observer: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lingering(ToyCloud):
        def answer(self, stream: ScriptedStream, frame: EdgeFrame) -> None:
            feed = stream.feed
            stream.feed = lambda *frames: feed(*filter(None, frames))  # type: ignore[method-assign]
            super().answer(stream, frame)

    monkeypatch.setattr(pipeline, "LAST_WORDS_S", 5.0)
    cloud, drafting = Lingering(LANGUAGE, 0), drafter_of(LANGUAGE)
    generator = SpeculativeGenerator(
        cloud.link, drafting, lambda: CARD, SpeculationPolicy(COUPLED), observer
    )
    last_chunk = asyncio.Event()

    async def read() -> None:
        async for chunk in generator.generate(request_of(max_tokens=4)):
            if chunk.finish_reason is not None:
                last_chunk.set()

    reader = asyncio.create_task(read())
    await last_chunk.wait()
    await asyncio.sleep(0)  # it waits for the stream's end now
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert observer.outcomes == ["length"]
    assert drafting.open_contexts == 0
    assert all(stream.closed for stream in cloud.link.streams)
