"""Both ends of the protocol joined in memory, in simulated time. One seed replays a run exactly.

The network keeps the order within a stream and nothing else: it delays, repeats frames, and
loses connections; what a lost stream still had on its way arrives late at the old ends.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from picospec.protocol import codec
from picospec.protocol.cloud_session import CloudSession
from picospec.protocol.draft_queue import DraftQueue, Work
from picospec.protocol.drafting import Allow, Drafted, DrafterEvent, Rollback
from picospec.protocol.edge_events import (
    Commit,
    EdgeEvent,
    Finished,
    LinkLost,
    Resume,
    Send,
    SetLength,
    Start,
    Tick,
)
from picospec.protocol.edge_machine import SpeculationPolicy
from picospec.protocol.edge_session import EdgeSession, replay
from picospec.protocol.messages import (
    AssistPolicy,
    CloudFrame,
    Draft,
    EdgeFrame,
    Finish,
    FinishReason,
    Limits,
    ModelCard,
    Open,
    Opened,
    Verdict,
    VerificationMode,
)
from picospec.protocol.session_spec import SessionSpec
from picospec.sampling.distribution import Distribution
from tests.sim.toy import (
    BorrowedLaw,
    Language,
    ToyDrafter,
    context_of,
    first_token,
    judge,
    rejection_at,
)

SPLIT = VerificationMode.SPLIT
MOST_EVENTS = 100_000


@dataclass(frozen=True)
class Faults:
    """What the network and the engine do wrong; rates are chances for each frame or step."""

    lose: float = 0.0  # the connection is lost as a frame is sent
    lose_in_recovery: float = 0.0  # as the edge learns of a rejection
    repeat: float = 0.0  # a draft arrives twice
    preempt: float = 0.0  # a step is planned and not carried out
    change: float = 0.0  # draft length and window change as a frame arrives
    take_over: float = 0.0  # policy auto: the cloud decodes alone, drafts there or not
    peek: bool = False  # it does so where the draft is odd
    crash: float = 0.0  # the drafter dies behind a draft, and with it what it had not told


@dataclass(frozen=True)
class Times:
    """Milliseconds; each delay varies by up to as much again."""

    link: float = 10.0
    step: float = 5.0
    draft: float = 1.0
    prefill: float = 8.0


@dataclass(frozen=True)
class Scenario:
    language: Language
    policy: SpeculationPolicy
    prompt: tuple[int, ...]
    seed: int
    max_tokens: int
    stop: tuple[int, ...] = ()
    faults: Faults = Faults()
    times: Times = Times()
    over_the_wire: bool = True  # through protobuf
    forget_judged: bool = False  # a deliberate fault of the edge
    successor: Language | None = None  # a drafter that died is followed by one with this Q
    reinterpret: bool = False  # a deliberate fault: drafts are thought to come from that Q
    max_resumes: int = 20


class Clock:
    """Simulated time: runs what is due, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, time: float, call: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._due, (time, self._count, call, args))

    def run(self, done: Callable[[], bool], most_events: int = MOST_EVENTS) -> None:
        for _ in range(most_events):
            if done():
                return
            assert self._due, "nothing is left to happen and the generation is not finished"
            self.now, _, call, args = heapq.heappop(self._due)
            call(*args)
        raise AssertionError("the generation does not end")


class Stream:
    """One connection. `up` and `down` deliver in order; after `lose` only to the far ends' past."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._last = {"up": 0.0, "down": 0.0}
        self.alive = True
        self.cloud = Cloud(world, self)

    def up(self, frame: EdgeFrame) -> None:
        self._deliver("up", self.cloud.receive, frame)
        if isinstance(frame, Draft) and self._world.chance(self._world.faults.repeat):
            self._deliver("up", self.cloud.receive, frame)

    def down(self, frame: CloudFrame) -> None:
        self._deliver("down", self._world.edge_receives, self, frame)

    def _deliver(self, way: str, call: Callable[..., None], *args: Any) -> None:
        world = self._world
        if not self.alive and world.chance(0.5):
            return
        time = max(self._last[way], world.clock.now + world.vary(world.scenario.times.link))
        self._last[way] = time
        world.clock.at(time, call, *args)
        if world.chance(world.faults.lose):
            world.lose(self)


class Cloud:
    """A replica's end of one stream: the servicer's session, and the engine's."""

    def __init__(self, world: World, stream: Stream) -> None:
        self._world = world
        self._stream = stream
        self._session = CloudSession(world.card)
        self._encoder, self._decoder = codec.EdgeEncoder(), codec.EdgeDecoder()
        self._busy = False
        self._done = False
        self._text: list[int] = []
        self._num_prompt = 0

    def receive(self, frame: EdgeFrame) -> None:
        if self._world.scenario.over_the_wire:
            frame = self._decoder.decode(self._encoder.encode(frame))
        match self._session.receive(frame):
            case Open() as request:
                self._request = request
                self._text = [
                    *request.prompt_token_ids.tolist(),
                    *request.output_token_ids.tolist(),
                ]
                self._num_prompt = len(request.prompt_token_ids)
                self._queue = DraftQueue(
                    request.mode, self._text, verify_whole_rounds=request.verify_whole_rounds
                )
                self._busy = True
                self._later(self._world.scenario.times.prefill, self._prefilled)
            case Draft() as draft:
                recovered = self._queue.add(draft, self._world.clock.now)
                if recovered is not None:
                    self._text.append(recovered)
                self._plan()
            case Finish():
                self._done = True

    def _later(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        self._world.clock.at(self._world.clock.now + self._world.vary(delay), call, *args)

    def _prefilled(self) -> None:
        request, position = self._request, len(self._text)
        self._busy = False
        self._send(
            Opened(
                first_position=position,
                cached_prompt_tokens=0,
                max_draft_tokens=16,
                window=64,
                sparse_k=request.sparse_k,
            )
        )
        language, seed = self._world.scenario.language, request.sampling.seed
        if request.probe:
            found = rejection_at(language, self._text, seed, request.sparse_k, request.probe - 1)
            self._queue.judged(rejected=True)
            self._send(Verdict(self._queue.epoch, position, rejection=found))
        else:
            own = (first_token(language, self._text, seed, request.mode),)
            self._text += own
            self._send(
                self._closing(
                    Verdict(
                        epoch=self._queue.epoch, position=position, num_accepted=0, token_ids=own
                    )
                )
            )
        self._plan()

    def _plan(self) -> None:
        """Begin a step if there is something to judge."""
        if self._busy or self._done:
            return
        work = self._queue.take(self._world.rng.randint(1, 16))
        assert (work is not None) == self._queue.has_work
        if work is None and not self._goes_on_alone:
            return
        if self._goes_on_alone and self._takes_over(work):
            work = None
        elif work is None and self._request.assist is AssistPolicy.AUTO:
            self._later(self._world.scenario.times.step, self._plan)  # wait for a draft
            return
        self._busy = True
        self._later(self._world.scenario.times.step, self._step, work)

    def _takes_over(self, work: Work | None) -> bool:
        faults = self._world.faults
        if faults.peek and work is not None and work.token_ids:
            return work.token_ids[0] % 2 == 1
        return self._world.chance(faults.take_over)

    @property
    def _goes_on_alone(self) -> bool:
        """Whether it may decode without a draft. After a split rejection it never may."""
        policy = self._request.assist
        return policy in (AssistPolicy.ALWAYS, AssistPolicy.AUTO) and not self._queue.is_edges_turn

    def _step(self, work: Work | None) -> None:
        self._busy = False
        if self._done:
            return
        if work is not None and self._world.chance(self._world.faults.preempt):
            self._plan()
            return
        request, position = self._request, len(self._text)
        language, seed = self._world.scenario.language, request.sampling.seed
        if work is None:
            own = (first_token(language, self._text, seed, request.mode),)
            self._text += own
            self._send(
                self._closing(
                    Verdict(
                        epoch=self._queue.epoch, position=position, num_accepted=0, token_ids=own
                    )
                )
            )
            self._queue.judged()
        else:
            assert work.position == position
            accepted, own, found = judge(
                language, self._text, seed, request.mode, work, request.sparse_k
            )
            emitted = [*work.token_ids[:accepted], *own][: self._room()]
            for index, token_id in enumerate(emitted):
                if token_id in request.stop_token_ids:
                    emitted, found = emitted[: index + 1], None
            accepted = min(accepted, len(emitted))
            self._text += emitted
            verdict = Verdict(
                epoch=work.epoch,
                position=position,
                num_accepted=accepted,
                token_ids=tuple(emitted[accepted:]),
                rejection=found,
                num_draft_tokens=len(work.token_ids),
                queue_us=10,
                compute_us=20,
            )
            self._send(self._closing(verdict))
            self._queue.judged(rejected=found is not None)
        self._plan()

    def _room(self) -> int:
        return self._num_prompt + self._request.max_tokens - len(self._text)

    def _closing(self, verdict: Verdict) -> Verdict:
        """The verdict, with its finish reason if the text is complete."""
        reason = None
        if len(self._text) > verdict.position and self._text[-1] in self._request.stop_token_ids:
            reason = FinishReason.STOP
        elif self._room() <= 0:
            reason = FinishReason.LENGTH
        if reason is None:
            return verdict
        self._done = True
        return replace(verdict, rejection=None, finish_reason=reason)

    def _send(self, frame: CloudFrame) -> None:
        self._session.send(frame)
        if self._world.scenario.over_the_wire:
            frame = codec.decode_cloud(codec.encode_cloud(frame))
        self._stream.down(frame)


class World:
    """One generation from end to end. `run` returns the output the user saw."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.faults = scenario.faults
        self.clock = Clock()
        # Apart from the sampling noise, so that faults do not depend on what is drawn.
        self.rng = random.Random(scenario.seed * 7919 + 1)
        self.card = ModelCard(
            model_id="toy",
            logits_width=scenario.language.vocab_size,
            tokenizer_fingerprint="",
            chat_template_fingerprint="",
            eos_token_ids=scenario.stop,
            max_model_len=len(scenario.prompt) + scenario.max_tokens,
            modes=tuple(VerificationMode),
            limits=Limits(),
            protocol_version=1,
        )
        self.spec = SessionSpec(
            session_id="sim",
            prompt_token_ids=np.array(scenario.prompt, np.int32),
            sampling=replace(scenario.language.params, seed=scenario.seed),
            max_tokens=scenario.max_tokens,
            stop_token_ids=scenario.stop,
            card=self.card,
            policy=scenario.policy,
        )
        self.session = EdgeSession(self.spec, log_length=MOST_EVENTS)
        self.drafter = self._new_drafter(scenario.language)
        self.stream: Stream | None = None
        self.output: list[int] = []
        self.reason: FinishReason | None = None
        self.resumes = 0
        self.late_frames = 0  # of lost streams, kept from the session
        self.losses_in_recovery = 0
        self.crashes = 0
        self.num_rejected = 0  # verdicts with a rejection
        self.orphans = 0  # drafts that were not judged when their drafter died
        self.trace = hashlib.sha256()
        self._drafting = False

    def run(self) -> list[int]:
        """The output. What goes wrong comes with the session's log, which replays it."""
        try:
            self._tell(Start())
            self.clock.run(lambda: self.reason is not None)
            assert self.output == self.session.output
            self.session.validate()
        except Exception as error:
            error.add_note(f"seed {self.scenario.seed}, {self.scenario.policy}")
            error.add_note("\n".join(f"{now:10.3f} {event}" for now, event in self.session.log))
            raise
        return self.output

    def replayed(self) -> EdgeSession:
        """A fresh session that was told all that this world's was."""
        session = EdgeSession(self.spec)
        replay(session, self.session.log)
        return session

    def chance(self, rate: float) -> bool:
        return rate > 0 and self.rng.random() < rate

    def vary(self, delay: float) -> float:
        return delay * (0.5 + self.rng.random())

    def edge_receives(self, stream: Stream, frame: CloudFrame) -> None:
        if stream is not self.stream:
            self.late_frames += 1
            return
        self._tell(frame)
        self.num_rejected += isinstance(frame, Verdict) and frame.rejection is not None
        if self.chance(self.faults.change):
            assist = self.scenario.policy.assist
            stops = [0] if assist in (AssistPolicy.ALWAYS, AssistPolicy.AUTO) else []
            length, window = self.rng.choice([1, 2, 5]), self.rng.choice([*stops, 1, 5, 20])
            self._tell(SetLength(length, window, lead=self.rng.choice([0, 3])))
        self._maybe_lose_in_recovery(isinstance(frame, Verdict) and frame.rejection is not None)

    def _new_drafter(self, language: Language) -> ToyDrafter:
        scenario = self.scenario
        return ToyDrafter(
            language,
            scenario.prompt,
            scenario.seed,
            scenario.policy.mode,
            scenario.stop,
            scenario.forget_judged,
            scenario.policy.confidence_stop,
        )

    @property
    def _text(self) -> list[int]:
        """All that the session has heard of."""
        chain = self.session.chain
        return [*self.scenario.prompt, *self.output, *chain.first(len(chain))]

    def _borrowed(self, event: Drafted) -> Drafted:
        """`event` with a Q that changes with the drafter."""
        context = context_of(self._text)

        def now() -> Distribution:
            language = self.scenario.successor if self.crashes else None
            law = (language or self.scenario.language).draft(context)
            assert law is not None
            return law

        laws = tuple(BorrowedLaw(event.token_ids[0], law, now) for law in event.laws)
        return replace(event, laws=laws)

    def _crash(self) -> None:
        """The drafter dies. Its successor goes on where the session has heard of it last."""
        language = self.scenario.successor or self.scenario.language
        lost = self.drafter
        self.crashes += 1
        self.orphans += len(self.session.chain)
        self.drafter = self._new_drafter(language)
        self.drafter.succeed(lost, self._text, is_exhausted=self.session.allowance.is_exhausted)
        self._draft()

    def lose(self, stream: Stream) -> None:
        if stream is not self.stream or self.resumes >= self.scenario.max_resumes:
            return
        stream.alive = False
        self.stream = None
        # Not within the call that is sending.
        self.clock.at(self.clock.now, self._lost)

    def _lost(self) -> None:
        if self.session.finished:
            return
        self._tell(LinkLost())
        self.clock.at(self.clock.now + self.vary(20.0), self._resume)

    def _resume(self) -> None:
        self.resumes += 1
        self._tell(Resume())

    def _maybe_lose_in_recovery(self, recovering: bool) -> None:
        if recovering and self.stream is not None and self.chance(self.faults.lose_in_recovery):
            self.losses_in_recovery += self.resumes < self.scenario.max_resumes
            self.lose(self.stream)

    def _tell(self, event: EdgeEvent) -> None:
        """Have the session handle `event`, and carry out what follows."""
        effects = self.session.handle(event, self.clock.now)
        self.session.validate()
        if not effects and isinstance(event, Tick):
            return
        for effect in effects:
            match effect:
                case Send(frame):
                    self._send(frame)
                case Commit(token_ids):
                    self.trace.update(repr((self.clock.now, token_ids)).encode())
                    self.output += token_ids
                case Finished(reason):
                    self.reason = reason
                case Allow() | Rollback():
                    self.drafter.command(effect)
        if (deadline := self.session.deadline) is not None:
            self.clock.at(deadline, self._tell, Tick())
        self._draft()

    def _send(self, frame: EdgeFrame) -> None:
        if isinstance(frame, Open):
            assert self.stream is None
            self.stream = Stream(self)
        if self.stream is not None:
            self.stream.up(frame)

    def _draft(self) -> None:
        if self._drafting or self.reason is not None or not self.drafter.can_step:
            return
        self._drafting = True
        self.clock.at(self.clock.now + self.vary(self.scenario.times.draft), self._drafted)

    def _drafted(self) -> None:
        """The drafter's step is done; its event takes a moment to reach the session."""
        self._drafting = False
        if self.drafter.can_step:
            for event in self.drafter.step():
                self.clock.at(self.clock.now + 0.1, self._edge_hears, event, self.crashes)
        self._draft()

    def _edge_hears(self, event: DrafterEvent, life: int) -> None:
        if life != self.crashes:
            return  # its drafter died before it was told
        is_current = event.branch == self.session.branch
        if self.scenario.reinterpret and is_current and isinstance(event, Drafted):
            event = self._borrowed(event)
        self._tell(event)
        if self.chance(self.faults.crash) and self.reason is None:
            self._crash()
