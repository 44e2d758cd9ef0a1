"""How each system makes one text, and what is noted about it.

All times are taken here, on the edge, when tokens are in the hands of whoever asked for them.
"""

import asyncio
import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import aclosing, closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from bench import openings
from bench.bed import Bed
from bench.metering import steps_ms, traffic
from bench.results import Record
from bench.scenarios import Condition, System, Value
from edge_agent import config as edge_config
from edge_agent.control import Control
from edge_agent.drafting.context import Drafting
from edge_agent.drafting.messages import ContextFailed, DraftEvent
from edge_agent.link import Link
from edge_agent.observer import PipelineObserver
from edge_agent.pipeline import SpeculativeGenerator
from edge_agent.server import control_of, policy_of
from picospec.performance.costs import Network, Scheme
from picospec.protocol.drafting import Allow, Drafted
from picospec.protocol.messages import AssistPolicy, ModelCard, TokenArray, VerificationMode

GENERATION_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One text to make."""

    prompt_id: str
    prompt_token_ids: TokenArray
    max_tokens: int
    seed: int
    order: int = 0  # its place in the repetition


@dataclass(slots=True)
class Stopwatch:
    """The tokens of one generation and when they came."""

    started_s: float = field(default_factory=time.perf_counter)
    first_s: float = 0.0
    last_s: float = 0.0
    num_first: int = 0
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # of each token

    def add(self, token_ids: Iterable[int]) -> None:
        before = len(self.token_ids)
        self.token_ids.extend(map(int, token_ids))
        if len(self.token_ids) == before:
            return
        self.last_s = time.perf_counter()
        self.times_s += [self.last_s] * (len(self.token_ids) - before)
        if not before:
            self.first_s, self.num_first = self.last_s, len(self.token_ids)

    def record(self, task: Task, **counts: Any) -> Record:
        return Record(
            prompt_id=task.prompt_id,
            order=task.order,
            token_ids=self.token_ids,
            ttft_s=self.first_s - self.started_s,
            seconds=self.last_s - self.first_s,
            num_first=self.num_first,
            **counts,
        )


async def generate(bed: Bed, condition: Condition, task: Task) -> Record:
    """Make the text. A failure is recorded, not raised: the other conditions go on."""
    run = {
        System.CLOUD_ONLY: _cloud_only,
        System.ENGINE_PLAIN: _engine_plain,
        System.EDGE_ONLY: _edge_only,
    }.get(condition.system, _speculate)
    try:
        async with asyncio.timeout(GENERATION_TIMEOUT_S):
            return await run(bed, condition, task)
    except Exception as error:
        if condition.system is System.CLOUD_ONLY:
            await bed.reconnect()  # the rest of its answer must not reach the next
        reason = f"{type(error).__name__}: {error}"
        return Record(task.prompt_id, task.order, [], 0.0, 0.0, error=reason)


def configured(condition: Condition) -> edge_config.EdgeConfig:
    """The edge daemon's configuration. Raises ConfigError for a key it lacks."""
    return edge_settings(condition.speculation)


def edge_settings(speculation: Mapping[str, Value]) -> edge_config.EdgeConfig:
    """With these keys of [speculation], the others as they come. Raises ConfigError."""
    flags = ["--drafter.model", "unused"]
    for key, value in speculation.items():
        flags += [f"--speculation.{key}", str(value).lower()]
    return edge_config.read(flags, {})


def speculator(
    config: edge_config.EdgeConfig,
    link: Link,
    drafting: Drafting,
    *,
    card: ModelCard,
    observer: PipelineObserver | None = None,
    control: Control | None = None,
) -> SpeculativeGenerator:
    """An edge as the daemon builds it; its generations learn from each other. `control`: from
    those of another one, too."""
    return SpeculativeGenerator(
        link, drafting, lambda: card, policy_of(config), observer, control or control_of(config)
    )


def scheme_of(condition: Condition) -> Scheme:
    """What the performance model is told of a condition's speculation."""
    policy = policy_of(configured(condition))
    shared = ("draft_length", "window", "parallel_draft", "fast_verify", "mode")
    return Scheme(**{name: getattr(policy, name) for name in shared}, kept_rows=policy.fast_verify)


def network_of(condition: Condition, rtt_ms: float) -> Network:
    bandwidth_bps = None if condition.kbit_s is None else condition.kbit_s * 1e3
    return Network(rtt_ms=rtt_ms, bandwidth_bps=bandwidth_bps)


async def _cloud_only(bed: Bed, condition: Condition, task: Task) -> Record:
    stock = bed.stock
    wire = await bed.stock_relay.counts()
    payload = stock.bytes_up, stock.bytes_down
    watch = Stopwatch()
    tokens = stock.generate(
        task.prompt_token_ids.tolist(), task.max_tokens, condition.temperature, task.seed
    )
    async with aclosing(tokens):
        async for token_ids in tokens:
            watch.add(token_ids)
    crossed = await bed.stock_relay.counts() - wire
    return watch.record(
        task,
        payload_up=stock.bytes_up - payload[0],
        payload_down=stock.bytes_down - payload[1],
        wire_up=crossed.up,
        wire_down=crossed.down,
    )


async def _engine_plain(bed: Bed, condition: Condition, task: Task) -> Record:
    """A coupled session that never gets a draft: the cloud decodes alone."""
    wire = await bed.cloud_relay.counts()
    bed.link.reset()
    watch = Stopwatch()
    session = openings.opening(
        task.prompt_token_ids,
        task.max_tokens,
        temperature=condition.temperature,
        seed=task.seed,
        assist=AssistPolicy.ALWAYS,
    )
    async with openings.opened(bed.link, session) as stream:
        async for verdict in openings.verdicts(stream):
            watch.add(verdict.token_ids)
    crossed = await bed.drained() - wire
    seen = replace(traffic(bed.link.sent, bed.link.received), outcomes="")  # of no draft
    return watch.record(
        task,
        payload_up=stream.bytes_up,
        payload_down=stream.bytes_down,
        wire_up=crossed.up,
        wire_down=crossed.down,
        **asdict(seen),
    )


async def _edge_only(bed: Bed, condition: Condition, task: Task) -> Record:
    assert condition.draft is not None
    drafting = bed.drafting[condition.draft]
    before = drafting.timed_tokens, drafting.drafting_s
    events: asyncio.Queue[DraftEvent] = asyncio.Queue()
    watch = Stopwatch()
    spec = openings.context(
        task.prompt_token_ids,
        task.max_tokens,
        temperature=condition.temperature,
        seed=task.seed,
        logits_width=bed.card.logits_width,
    )
    with closing(drafting.open(spec, events.put_nowait)) as context:
        context.send(Allow(spec.max_length))
        while len(watch.token_ids) < task.max_tokens:
            match await events.get():
                case Drafted(token_ids=token_ids):
                    watch.add(token_ids)
                case ContextFailed(error):
                    raise error
    return watch.record(task, draft_ms=_draft_ms(bed, condition.draft, before))


async def _speculate(bed: Bed, condition: Condition, task: Task) -> Record:
    assert condition.draft is not None
    drafting = bed.drafting[condition.draft]
    wire = await bed.cloud_relay.counts()
    bed.link.reset()
    config = configured(condition)
    # As in the daemon, an edge's chats learn from each other, whatever the link is like.
    edge = replace(condition, rtt_ms=0.0, kbit_s=None, temperature=0.0)
    control = bed.controls.setdefault(edge, control_of(config))
    policy = policy_of(config)
    coupled = policy.mode is VerificationMode.COUPLED
    generator = speculator(config, bed.link, drafting, card=bed.card, control=control)
    request = openings.request(
        task.prompt_token_ids, task.max_tokens, temperature=condition.temperature, seed=task.seed
    )
    watch = Stopwatch()
    generation = generator.generate(request)
    before: tuple[int, float] | None = None  # once the drafter's prefill is behind it
    try:
        async for chunk in generation:
            if before is None and watch.token_ids:
                before = drafting.timed_tokens, drafting.drafting_s
            watch.add(chunk.token_ids)
    finally:
        await generation.aclose()
    stats = generation.stats
    crossed = await bed.drained() - wire
    return watch.record(
        task,
        first_draft_s=bed.link.first_draft_s,
        restart_ms=1e3 * statistics.median(bed.link.restarts_s or [0.0]),
        rollbacks=stats.rollbacks,
        resumes=stats.resumes,
        payload_up=stats.bytes_up,
        payload_down=stats.bytes_down,
        wire_up=crossed.up,
        wire_down=crossed.down,
        draft_ms=_draft_ms(bed, condition.draft, before) if before is not None else 0.0,
        slowness=_slowness(bed, keeps_rows=policy.fast_verify and not coupled),
        **asdict(traffic(bed.link.sent, bed.link.received)),
    )


def _slowness(bed: Bed, *, keeps_rows: bool) -> float:
    """Of the last generation's verification."""
    steps = steps_ms(bed.link.received, keeps_rows)
    if bed.verify_ms is None or not steps:
        return 1.0
    return sum(ms for _, ms in steps) / sum(bed.verify_ms(count) for count, _ in steps)


def _draft_ms(bed: Bed, draft: str, before: tuple[int, float]) -> float:
    """The drafter's time for each token since `before`: timed_tokens, drafting_s."""
    drafting = bed.drafting[draft]
    num_tokens = drafting.timed_tokens - before[0]
    return (drafting.drafting_s - before[1]) / num_tokens * 1e3 if num_tokens else 0.0


def prompt_tokens(bed: Bed, text: str) -> TokenArray:
    """A chat of one message, up to where the assistant begins."""
    return np.asarray(bed.tokenizer.encode_chat([{"role": "user", "content": text}]), np.int32)
