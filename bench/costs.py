"""What verification and drafting take when nothing is in their way.

Verification: a session is fed `k` drafts that are all right, as one round, and its Verdict tells
what the forward and the sampling took. The right drafts are known from the same text, made
before without drafts, which also gives k = 0. Counts take turns, so that drift hits all alike.
"""

import asyncio
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import numpy as np

from bench import openings
from bench.bed import Bed
from bench.openings import COUPLED, SPLIT
from bench.results import Costs
from bench.scenarios import Condition, System
from bench.systems import Task, generate
from edge_agent.drafting.messages import DraftEvent
from edge_agent.drafting.process import DraftingProcess
from edge_agent.drafting.worker import PROPOSAL_TOKENS_MAX
from picospec.protocol.drafting import Allow, Drafted, Rollback
from picospec.protocol.messages import AssistPolicy, Draft, Rejection, TokenArray, VerificationMode
from picospec.sampling.distribution import Distribution
from picospec.sampling.rejection import RejectionSampler

COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
SAFE_PROB = 1e-12  # claimed for a draft in split mode; the target's is above it: accepted
SAMPLED = 0.7  # temperature at which split mode is measured
RECOVERIES = {"sparse": 64, "whole": 0}  # pairs of a rejection; 0: all
RECOVERED = 20  # tokens
DRAFT_TOKENS = 64  # drafted in a row to time the drafter
PREFILL_S = 1.0  # for the drafter's prompt
CYCLE_TOKENS = sum(count + 1 for count in COUNTS)  # with a bonus token each
SESSION_TOKENS = CYCLE_TOKENS + 8


async def measure(bed: Bed, prompt_token_ids: TokenArray, cycles: int) -> Costs:
    """On a link without delay. `cycles`: verdicts for each number of drafts."""
    await bed.set_link(0.0, None)
    task = Task("costs", prompt_token_ids, SESSION_TOKENS, seed=1)
    costs = Costs()
    plain = Condition(System.CLOUD_ONLY, None, 0.0)
    baseline = await _timed(bed, plain, task)
    costs.baseline_ms = 1e3 / baseline
    verify_ms: dict[str, dict[int, list[float]]] = {
        mode.value: defaultdict(list) for mode in VerificationMode
    }
    for cycle in range(cycles + 1):
        if cycle == 1:  # the first of each size is slow, by seconds at times: it does not count
            for times in verify_ms.values():
                times.clear()
        text = await _decode(bed, prompt_token_ids, verify_ms["coupled"][0])
        await _verify(bed, prompt_token_ids, text, COUPLED, verify_ms["coupled"])
        await _verify(bed, prompt_token_ids, text, SPLIT, verify_ms["split"])
    costs.verify_ms = {
        mode: {count: statistics.median(times) for count, times in sorted(by_count.items())}
        for mode, by_count in verify_ms.items()
    }
    for draft in bed.drafting:
        costs.recover_ms[draft] = {
            kind: statistics.median(_recover(size or bed.card.logits_width))
            for kind, size in RECOVERIES.items()
        }
        alone = Condition(System.EDGE_ONLY, draft, 0.0)
        task = Task("costs", prompt_token_ids, DRAFT_TOKENS, seed=1)
        costs.draft_ms[draft] = 1e3 / await _timed(bed, alone, task)
    return costs


async def slowness(bed: Bed, prompt: TokenArray, costs: Costs, cycles: int) -> dict[str, float]:
    """What verification takes now, over `costs.alone_ms`: `alone`, and while each draft model
    drafts. Medians over the numbers of drafts. On the link as it is."""

    async def ratio() -> float:
        times_ms: dict[int, list[float]] = defaultdict(list)
        text = await _decode(bed, prompt, times_ms[0])
        for _ in range(cycles):
            await _verify(bed, prompt, text, SPLIT, times_ms)
        return statistics.median(
            statistics.median(times) / costs.alone_ms(count) for count, times in times_ms.items()
        )

    found = {"alone": await ratio()}
    for draft, drafting in bed.drafting.items():
        async with _drafting_on(drafting, prompt, bed.card.logits_width):
            found[draft] = await ratio()
    return found


def _recover(size: int) -> list[float]:
    """Milliseconds from a rejection of `size` pairs to the recovered token."""
    rng = np.random.default_rng(1)
    ids = np.arange(size, dtype=np.int32)
    law = Distribution(
        ids[:PROPOSAL_TOKENS_MAX],
        rng.dirichlet(np.ones(min(size, PROPOSAL_TOKENS_MAX))).astype(np.float32),
    )
    times_ms = []
    for position in range(RECOVERED):
        rejection = Rejection(ids, rng.dirichlet(np.ones(size)).astype(np.float32))
        started_s = time.perf_counter()
        RejectionSampler(1, position, law).offer(rejection, attempt=0)
        times_ms.append((time.perf_counter() - started_s) * 1e3)
    return times_ms


@asynccontextmanager
async def _drafting_on(
    drafting: DraftingProcess, prompt: TokenArray, logits_width: int
) -> AsyncIterator[None]:
    """The drafter computes all the while, over and over the same stretch of text."""
    length = len(prompt)
    branches = itertools.count(1)

    def on_event(event: DraftEvent) -> None:
        if isinstance(event, Drafted) and event.position >= length + DRAFT_TOKENS - 1:
            context.send(Rollback(next(branches), length))

    spec = openings.context(prompt, DRAFT_TOKENS, logits_width=logits_width)
    with closing(drafting.open(spec, on_event)) as context:
        context.send(Allow(spec.max_length))
        await asyncio.sleep(PREFILL_S)
        yield


async def _timed(bed: Bed, condition: Condition, task: Task) -> float:
    """Tokens per second. Raises RuntimeError if it fails."""
    record = await generate(bed, condition, task)
    if record.error:
        raise RuntimeError(f"{condition.name}: {record.error}")
    return record.tokens_per_s


async def _decode(bed: Bed, prompt: TokenArray, times_ms: list[float]) -> list[int]:
    """The greedy text of the target alone; adds each step's time."""
    text: list[int] = []
    session = openings.opening(prompt, SESSION_TOKENS, assist=AssistPolicy.ALWAYS)
    async with openings.opened(bed.link, session) as stream:
        async for verdict in openings.verdicts(stream):
            if text:  # not the prompt's prefill
                times_ms.append(verdict.compute_us / 1e3)
            text += verdict.token_ids
    return text


async def _verify(
    bed: Bed,
    prompt: TokenArray,
    text: list[int],
    mode: VerificationMode,
    times_ms: dict[int, list[float]],
) -> None:
    """Feed `text` to a session, COUNTS drafts at a time, and add what each verdict took."""
    split = mode is SPLIT
    counts = iter(COUNTS)
    position, epoch = len(prompt), 0
    session = openings.opening(
        prompt,
        SESSION_TOKENS,
        mode=mode,
        temperature=SAMPLED if split else 0.0,
        verify_whole_rounds=True,
    )
    async with openings.opened(bed.link, session) as stream:
        async for verdict in openings.verdicts(stream):
            if verdict.num_draft_tokens:
                times_ms[verdict.num_draft_tokens].append(verdict.compute_us / 1e3)
            if verdict.rejection is not None:
                raise RuntimeError("a draft that was the target's own was rejected")
            position += verdict.num_accepted + len(verdict.token_ids)
            if not (count := next(counts, 0)):
                return
            done = position - len(prompt)
            drafts = tuple(text[done : done + count])
            probs = (SAFE_PROB,) * count if split else ()
            if verdict.num_draft_tokens and verdict.token_ids:
                epoch += 1  # the cloud's own token ended the chain
            stream.send(
                Draft(epoch, position, token_ids=drafts, draft_probs=probs, end_of_round=True)
            )
