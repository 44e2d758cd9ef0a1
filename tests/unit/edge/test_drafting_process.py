"""The real worker process, with drafters that need no model: life, death and rebuilding."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_agent.drafting import process
from edge_agent.drafting.context import DraftContext
from edge_agent.drafting.ipc import WorkerChannel, encode
from edge_agent.drafting.messages import ContextFailed, ContextSpec, DrafterSpec
from edge_agent.drafting.process import DraftingProcess
from edge_agent.drafting.scripted import SCRIPT_FILE, ScriptedDrafting, pseudo_model
from edge_agent.drafting.worker import DraftWorker
from picospec.errors import CapacityError, DrafterFailed
from picospec.protocol.drafting import Allow, Drafted, Exhausted, Rollback
from picospec.protocol.messages import Rejection, SamplingParams, VerificationMode
from picospec.sampling.distribution import Distribution
from picospec.sampling.rejection import RejectionSampler
from tests.support.builders import make_context_spec

WIDTH, MODEL_SEED = 32, 3
WINDOW = 6
NUM_TOKENS = 60


@pytest.fixture
def script_spec(tmp_path):
    def write(token_s: float = 0.0, **failures) -> DrafterSpec:
        description = {"logits_width": WIDTH, "seed": MODEL_SEED, "token_s": token_s, **failures}
        (tmp_path / SCRIPT_FILE).write_text(json.dumps(description))
        return DrafterSpec("scripted", str(tmp_path))

    return write


@contextlib.asynccontextmanager
async def running(spec, **options):
    drafting = DraftingProcess(spec, **options)
    await drafting.start()
    try:
        yield drafting
    finally:
        await drafting.stop()


async def until(condition, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 -- what is awaited has no event
            await asyncio.sleep(0.002)


def context_spec(mode=VerificationMode.SPLIT, seed=5, temperature=1.0) -> ContextSpec:
    params = SamplingParams(temperature=temperature, seed=seed)
    return ContextSpec(f"r{seed}", np.array([1, 2, 3], np.int32), params, mode, (), 3)


class Chat:
    """A generation whose verdicts are a function of the position, so that a run can be repeated.

    Positions divisible by 4 are rejected: in split mode the token is recovered from a sparse law
    with a fat tail, by the law that came with the draft, in coupled mode replaced.
    """

    def __init__(self, drafting, spec: ContextSpec) -> None:
        self.spec = spec
        self.text = spec.token_ids.tolist()  # committed
        self.drafts: list[tuple[int, tuple[Distribution, ...]]] = []
        self.probs: list[float] = []  # of accepted drafts
        self.branch = 0
        self.failed: ContextFailed | None = None
        self.done = asyncio.Event()
        self.context = drafting.open(spec, self.on_event)
        self.context.send(Allow(len(self.text) + WINDOW))

    def on_event(self, event) -> None:
        if isinstance(event, ContextFailed):
            self.failed = event
            self.done.set()
            return
        assert event.branch == self.branch
        if isinstance(event, Drafted):
            assert event.position == len(self.text) + len(self.drafts)
            self.drafts.append((event.token_ids[0], event.laws))
            if len(self.drafts) == WINDOW:  # judge a whole window at once
                self.judge()
        if len(self.text) >= NUM_TOKENS:
            self.context.close()
            self.done.set()

    def judge(self) -> None:
        for token_id, laws in self.drafts:
            if len(self.text) % 4 == 0:
                self.branch += 1
                self.drafts = []
                coupled = self.spec.mode is VerificationMode.COUPLED
                recovered = 7 if coupled else self.recovered(laws[0])
                self.context.send(
                    Rollback(branch=self.branch, length=len(self.text), token_ids=(recovered,))
                )
                self.commit(recovered)
                break
            self.probs += [law.prob(token_id) for law in laws]
            self.commit(token_id)
        else:
            self.drafts = []
        self.context.send(Allow(len(self.text) + WINDOW))

    def recovered(self, law: Distribution) -> int:
        position = len(self.text)
        # Tail samples the drafter itself favours, so that some are refused.
        logits = pseudo_model(WIDTH, MODEL_SEED)(np.array(self.text))
        for attempt in itertools.count():
            rejection = Rejection(
                token_ids=np.array([30, 31], np.int32),
                probs=np.array([0.1, 0.1], np.float32),
                tail_mass=0.8,
                tail_token_id=int(np.argsort(-logits)[attempt % 3]),
                tail_prob=0.2,
            )
            sampler = RejectionSampler(self.spec.sampling.seed, position, law)
            token_id = sampler.offer(rejection, attempt)
            if token_id is not None:
                return token_id
        raise AssertionError

    def commit(self, token_id: int) -> None:
        self.text.append(token_id)


SPECS = [
    context_spec(mode, seed, temperature)
    for mode in VerificationMode
    for seed, temperature in [(1, 1.0), (2, 0.7), (3, 0.0)]
]


async def undisturbed() -> list[Chat]:
    drafting = ScriptedDrafting(pseudo_model(WIDTH, MODEL_SEED), WIDTH)
    await drafting.start()
    chats = [Chat(drafting, spec) for spec in SPECS]
    async with asyncio.timeout(30):
        for chat in chats:
            await chat.done.wait()
    await drafting.stop()
    assert drafting.open_contexts == 0
    return chats


def same(chats: list[Chat], expected: list[Chat]) -> None:
    assert [chat.text for chat in chats] == [chat.text for chat in expected]
    assert [chat.probs for chat in chats] == [chat.probs for chat in expected]


class CrashingDrafting(ScriptedDrafting):
    """Loses its worker, and what that had emitted, at random moments."""

    def __init__(self, seed: int) -> None:
        super().__init__(pseudo_model(WIDTH, MODEL_SEED), WIDTH)
        self._random = random.Random(seed)
        self.life = 0

    def _emit(self, context_id, event) -> None:
        life = self.life
        asyncio.get_running_loop().call_soon(
            lambda: self.life == life and self._deliver(context_id, event)
        )

    def _schedule(self) -> None:
        if self._random.random() < 0.05:
            self.life += 1
            self._worker = DraftWorker(self.drafter, self._emit)
            for context_id, context in self.contexts.items():
                for command in context.rebuild():
                    self._worker.handle(context_id, command)
        super()._schedule()


@pytest.mark.parametrize("seed", range(10))
async def test_rebuilt_contexts_go_on_where_the_events_left_off(seed):
    expected, drafting = await undisturbed(), CrashingDrafting(seed)
    chats = [Chat(drafting, spec) for spec in SPECS]
    for chat in chats:
        await asyncio.wait_for(chat.done.wait(), 30)
    same(chats, expected)
    assert drafting.life > 20


async def test_process_and_double_draft_the_same(script_spec):
    expected = await undisturbed()
    async with running(script_spec()) as drafting:
        assert drafting.logits_width == WIDTH
        chats = [Chat(drafting, spec) for spec in SPECS]
        for chat in chats:
            await asyncio.wait_for(chat.done.wait(), 30)
        same(chats, expected)
        assert drafting.open_contexts == 0
        assert drafting.drafted_tokens > 0
        assert drafting.drafting_s > 0


async def test_killed_worker_loses_no_chat(script_spec, monkeypatch):
    monkeypatch.setattr(process, "RESTARTS_MAX", 50)
    monkeypatch.setattr(process, "BACKOFF_FIRST_S", 0.0)
    expected = await undisturbed()
    async with running(script_spec(token_s=0.001)) as drafting:
        chats = [Chat(drafting, spec) for spec in SPECS]
        for delay_s in (0.03, 0.11, 0.07, 0.05, 0.0):
            await until(lambda: drafting.alive)
            await asyncio.sleep(delay_s)
            os.kill(drafting.pid, signal.SIGKILL)
            await until(lambda: not drafting.alive)
        assert not all(chat.done.is_set() for chat in chats)
        for chat in chats:
            await asyncio.wait_for(chat.done.wait(), 30)
        same(chats, expected)
        assert drafting.restarts == 5


async def test_a_stopped_worker_is_killed_and_loses_no_chat(script_spec):
    expected = await undisturbed()
    async with running(script_spec(token_s=0.001), turn_timeout_s=0.4) as drafting:
        chats = [Chat(drafting, spec) for spec in SPECS]
        await asyncio.sleep(0.03)
        stopped = drafting.pid
        os.kill(stopped, signal.SIGSTOP)
        await until(lambda: drafting.alive and drafting.pid != stopped)
        for chat in chats:
            await asyncio.wait_for(chat.done.wait(), 30)
        same(chats, expected)
        assert drafting.restarts == 1
        assert drafting.problem == ""


async def test_contexts_may_be_opened_before_the_drafter_is_loaded(script_spec):
    drafting = DraftingProcess(script_spec())
    drafting.begin()
    try:
        assert "loading" in drafting.trouble
        chat = Chat(drafting, SPECS[0])
        await asyncio.wait_for(chat.done.wait(), 30)
        assert drafting.trouble == ""
        troubled_s = drafting.troubled_s
        assert troubled_s > 0.0
        await asyncio.sleep(0.05)
        assert drafting.troubled_s == troubled_s
    finally:
        await drafting.stop()


async def test_a_drafter_that_does_not_load_says_why_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "RESTARTS_MAX", 1)
    monkeypatch.setattr(process, "RETRY_AFTER_S", 0.2)
    drafting = DraftingProcess(DrafterSpec("scripted", str(tmp_path)))
    drafting.begin()
    try:
        await until(lambda: "script.json" in drafting.trouble)
        description = {"logits_width": WIDTH, "seed": MODEL_SEED, "token_s": 0.0}
        (tmp_path / SCRIPT_FILE).write_text(json.dumps(description))
        await until(lambda: drafting.trouble == "")
        chat = Chat(drafting, SPECS[0])
        await asyncio.wait_for(chat.done.wait(), 30)
    finally:
        await drafting.stop()


@pytest.mark.parametrize(
    ("failure", "reason"), [("no memory", "98304 bytes are too many"), ("killed", "died loading")]
)
async def test_a_drafter_that_fails_to_load_is_waited_for_by_nobody(
    script_spec, monkeypatch, failure, reason
):
    monkeypatch.setattr(process, "RESTARTS_MAX", 1)
    monkeypatch.setattr(process, "RETRY_AFTER_S", 0.2)
    drafting = DraftingProcess(script_spec(load=failure))
    drafting.begin()
    try:
        await until(lambda: reason in drafting.trouble)
        troubled_s = drafting.troubled_s
        await asyncio.sleep(0.05)
        assert drafting.troubled_s >= troubled_s + 0.05
        script_spec()
        await until(lambda: drafting.trouble == "")
        chat = Chat(drafting, SPECS[0])
        await asyncio.wait_for(chat.done.wait(), 30)
    finally:
        await drafting.stop()


def failing_spec() -> ContextSpec:
    return make_context_spec(token_ids=[9, 2, 3])


async def fail(drafting, count=1):
    chats = [Chat(drafting, failing_spec()) for _ in range(count)]
    for chat in chats:
        await asyncio.wait_for(chat.done.wait(), 30)
        assert isinstance(chat.failed.error, DrafterFailed)


async def test_logits_that_are_no_numbers_are_trouble_until_another_chat_drafts(script_spec):
    async with running(script_spec(nan_behind=9)) as drafting:
        pid = drafting.pid
        await fail(drafting)
        assert "NumericalError" in drafting.trouble
        await asyncio.sleep(0.05)
        troubled_s = drafting.troubled_s
        assert troubled_s >= 0.05
        chat = Chat(drafting, SPECS[0])
        await asyncio.wait_for(chat.done.wait(), 30)
        assert drafting.trouble == ""
        troubled_s = drafting.troubled_s
        await asyncio.sleep(0.05)
        assert drafting.troubled_s == troubled_s
        assert (drafting.pid, drafting.restarts) == (pid, 0)


async def test_a_drafter_that_failed_may_try_again_after_a_rest(script_spec, monkeypatch):
    monkeypatch.setattr(process, "FAILURE_REST_S", 0.2)
    async with running(script_spec(nan_behind=9)) as drafting:
        await fail(drafting)
        assert drafting.trouble
        await until(lambda: drafting.trouble == "")
        await until(lambda: drafting.troubled_s == pytest.approx(0.2, abs=0.15))
        troubled_s = drafting.troubled_s
        await asyncio.sleep(0.05)
        assert drafting.troubled_s == troubled_s


async def test_a_worker_in_which_all_fails_is_replaced(script_spec):
    async with running(script_spec(nan_behind=9)) as drafting:
        pid = drafting.pid
        await fail(drafting, process.FAILURES_MAX)
        await until(lambda: drafting.alive and drafting.pid != pid)
        assert drafting.restarts == 1
        assert "NumericalError" in drafting.trouble, "until it is known to work"
        chat = Chat(drafting, SPECS[0])
        await asyncio.wait_for(chat.done.wait(), 30)
        assert drafting.trouble == ""


async def test_a_stopped_worker_is_told_of(script_spec):
    async with running(script_spec(), turn_timeout_s=2.0) as drafting:
        os.kill(drafting.pid, signal.SIGSTOP)
        await until(lambda: "answers nothing" in drafting.trouble)
        os.kill(drafting.pid, signal.SIGCONT)
        await until(lambda: drafting.trouble == "")
        assert drafting.restarts == 0


async def test_a_worker_that_finishes_its_turns_is_left_alone(script_spec):
    async with running(script_spec(), turn_timeout_s=0.2) as drafting:
        pid = drafting.pid
        await asyncio.sleep(1.0)  # idle for many times as long as a turn may take
        assert drafting.pid == pid
        assert drafting.problem == ""


def test_a_drafter_that_is_stopped_hears_of_rollbacks_when_it_goes_on() -> None:
    sent = []
    context = DraftContext(1, context_spec(), print, lambda _id, command: sent.append(command))
    context.send(Allow(3))
    del sent[:]
    for branch, token_id in enumerate((7, 8, 9), 1):
        context.send(Rollback(branch=branch, length=2 + branch, token_ids=(token_id,)))
    assert sent == []
    context.send(Allow(8))
    assert sent == [Rollback(branch=3, length=3, token_ids=(7, 8, 9)), Allow(8)]
    context.send(Rollback(branch=4, length=6, token_ids=(5,)))
    assert sent[2:] == [Rollback(branch=4, length=6, token_ids=(5,))]


async def test_too_many_deaths_fail_the_chats_then_it_is_tried_again(script_spec, monkeypatch):
    monkeypatch.setattr(process, "RESTARTS_MAX", 1)
    monkeypatch.setattr(process, "RESTART_WINDOW_S", 1000.0)
    monkeypatch.setattr(process, "RETRY_AFTER_S", 0.5)
    async with running(script_spec(token_s=0.01)) as drafting:
        chat = Chat(drafting, context_spec())
        for _ in range(2):
            await until(lambda: drafting.alive)
            os.kill(drafting.pid, signal.SIGKILL)
            await until(lambda: not drafting.alive)
        await asyncio.wait_for(chat.done.wait(), 5)
        assert isinstance(chat.failed.error, DrafterFailed)
        assert drafting.open_contexts == 0
        with pytest.raises(DrafterFailed):
            drafting.open(context_spec(), print)
        await until(lambda: drafting.alive)  # it is tried again, later
        chat = Chat(drafting, SPECS[0])
        await asyncio.wait_for(chat.done.wait(), 30)
        assert chat.failed is None


async def test_a_worker_that_does_not_read_is_replaced(script_spec, monkeypatch):
    monkeypatch.setattr(process, "PENDING_BYTES_MAX", 100_000)
    monkeypatch.setattr(process, "EXIT_GRACE_S", 0.1)
    async with running(script_spec()) as drafting:
        events = []
        context = drafting.open(context_spec(), events.append)
        os.kill(drafting.pid, signal.SIGSTOP)
        for limit in range(10_000):
            context.send(Allow(limit % 7))
        context.send(Allow(4))
        await until(lambda: events)
        assert drafting.restarts == 1
        assert events[0].position == 3


async def test_contexts_share_the_drafter_fairly(script_spec):
    async with running(script_spec(token_s=0.001)) as drafting:
        order = []
        contexts = [
            drafting.open(context_spec(seed=index), lambda _event, index=index: order.append(index))
            for index in range(8)
        ]
        for context in contexts:
            context.send(Allow(3 + 20))
        await until(lambda: len(order) == 160)
        counts = [order[: 8 * 15].count(index) for index in range(8)]
        assert min(counts) >= 13


async def test_events_of_an_older_branch_are_not_delivered(script_spec):
    async with running(script_spec()) as drafting:
        events = []
        context = drafting.open(context_spec(), events.append)
        context.send(Allow(50))
        await until(lambda: len(events) >= 3)
        seen = len(events)
        context.send(Rollback(branch=1, length=4, token_ids=(9,)))
        assert len(events) == seen
        await until(lambda: len(events) == seen + 45)
        assert [event.branch for event in events[seen:]] == [1] * 45
        assert [event.position for event in events[seen:]] == [*range(5, 50)]
        with pytest.raises(ValueError, match="cannot roll back"):
            context.send(Rollback(2, 4))  # committed
        with pytest.raises(ValueError, match="cannot roll back"):
            context.send(Rollback(2, 51))  # not drafted yet


async def test_contexts_are_bounded_and_closing_frees_them(script_spec):
    async with running(script_spec(), max_contexts=2) as drafting:
        contexts = [drafting.open(context_spec(), print) for _ in range(2)]
        with pytest.raises(CapacityError):
            drafting.open(context_spec(), print)
        contexts[0].close()
        contexts[0].close()
        assert drafting.open_contexts == 1
        drafting.open(context_spec(), print)


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def rss_kib(pid: int) -> int:
    return int(proc(pid, "status").split("VmRSS:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_200_opened_and_closed_leave_nothing(script_spec):
    async with running(script_spec()) as drafting:

        async def cycle(count: int) -> None:
            for index in range(count):
                events = []
                context = drafting.open(context_spec(seed=index), events.append)
                context.send(Allow(10))
                if index % 3:
                    await until(lambda events=events: len(events) >= 2)
                    context.send(Rollback(1, 4))
                context.close()

        await cycle(50)
        before, tasks = rss_kib(drafting.pid), len(asyncio.all_tasks())
        descriptors = len(os.listdir(f"/proc/{drafting.pid}/fd"))
        await cycle(200)
        assert drafting.open_contexts == 0
        assert len(asyncio.all_tasks()) == tasks
        assert len(os.listdir(f"/proc/{drafting.pid}/fd")) == descriptors
        assert rss_kib(drafting.pid) - before < 2048


async def test_load_failures_are_told(tmp_path):
    with pytest.raises(DrafterFailed, match="holds no genai_config"):
        await DraftingProcess(DrafterSpec("onnx", str(tmp_path))).start()
    with pytest.raises(DrafterFailed, match="cannot pin the drafter to CPU 4000"):
        await DraftingProcess(DrafterSpec("ngram", "", cpu=4000)).start()


async def test_loading_is_bounded(script_spec):
    drafting = DraftingProcess(script_spec(), load_timeout_s=0.001)
    with pytest.raises(DrafterFailed, match="did not load within"):
        await drafting.start()
    assert drafting.pid is None


async def test_ngram_in_a_worker(tmp_path):
    async with running(DrafterSpec("ngram", str(tmp_path))) as drafting:
        events = []
        text = np.array([1, 2, 3, 4, 1, 2, 3], np.int32)
        spec = ContextSpec("r", text, SamplingParams(), VerificationMode.COUPLED, (), 7)
        context = drafting.open(spec, events.append)
        context.send(Allow(10))
        await until(lambda: len(events) == 3)
        assert [event.token_ids for event in events] == [(4,), (1,), (2,)]
        context.send(Rollback(branch=1, length=8, token_ids=(77,)))
        await until(lambda: len(events) == 4)
        assert events[3] == Exhausted(1, 9)


async def test_stop_ends_the_worker(script_spec):
    drafting = DraftingProcess(script_spec())
    await drafting.start()
    pid = drafting.pid
    await drafting.stop()
    await drafting.stop()
    assert not drafting.alive
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(DrafterFailed):
        drafting.open(context_spec(), print)


PARENT = """
import asyncio, sys
from edge_agent.drafting.messages import DrafterSpec
from edge_agent.drafting.process import DraftingProcess

async def main():
    drafting = DraftingProcess(DrafterSpec("scripted", sys.argv[1]))
    await drafting.start()
    print(drafting.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_dies_with_its_parent(script_spec):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, script_spec().model],
        stdout=subprocess.PIPE,
        cwd=Path(process.__file__).parents[2],
    )
    with parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 5
    while (
        Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_worker_loads_no_runtime_it_does_not_use(script_spec):
    async with running(script_spec()) as drafting:
        maps = proc(drafting.pid, "maps")
        assert "numpy" in maps
        assert "libtorch" not in maps
        assert "onnxruntime" not in maps


async def test_a_message_that_has_begun_is_waited_for() -> None:
    """A whole distribution is more than a socket holds; without blocking it would come in parts."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = WorkerChannel(theirs)
        assert channel.receive(block=False) == []
        message = encode(bytes(4_000_000))
        ours.sendall(message[:3])
        writer = asyncio.create_task(asyncio.to_thread(ours.sendall, message[3:]))
        assert await asyncio.to_thread(channel.receive, block=False) == [bytes(4_000_000)]
        await writer


async def test_waiting_is_no_drafting(script_spec) -> None:
    async with running(script_spec()) as drafting:
        events = []
        context = drafting.open(context_spec(), events.append)
        context.send(Allow(3 + WINDOW))
        await until(lambda: len(events) == WINDOW)
        before_s, waited_s = drafting.drafting_s, 0.5
        await asyncio.sleep(waited_s)
        context.send(Rollback(branch=1, length=3, token_ids=(7,)))
        await until(lambda: events[-1].branch == 1)
        assert drafting.drafting_s - before_s < waited_s / 2
