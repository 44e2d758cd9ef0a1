"""A tiny language: target and drafter are Markov chains with random laws over a few tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from picospec.protocol.draft_queue import Work
from picospec.protocol.drafting import (
    Allow,
    Drafted,
    DrafterCommand,
    DrafterEvent,
    Exhausted,
    Paused,
    Rollback,
)
from picospec.protocol.messages import (
    EMPTY_TOKENS,
    ProbArray,
    Rejection,
    SamplingParams,
    VerificationMode,
)
from picospec.sampling.distribution import Distribution, draw, process
from picospec.sampling.noise import Purpose, race, uniform
from picospec.sampling.rejection import accept

NUM_CONTEXT = 2  # tokens a law depends on


class Language:
    """Laws that depend on the last tokens only, for one set of sampling parameters.

    `agreement` 1 makes the drafter equal to the target, 0 independent of it.
    """

    def __init__(
        self, vocab_size: int, law_seed: int, agreement: float, params: SamplingParams
    ) -> None:
        self.vocab_size = vocab_size
        self.params = params
        self._law_seed = law_seed
        self._agreement = agreement
        self.target = cache(self._target)
        self.draft = cache(self._draft)

    def _logits(self, which: int, context: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([self._law_seed, which, *context])
        return rng.normal(scale=1.5, size=self.vocab_size).astype(np.float32)

    def _target(self, context: tuple[int, ...]) -> Distribution:
        logits = self._logits(0, context)
        return process(logits, self.params, EMPTY_TOKENS, EMPTY_TOKENS)

    def draft_logits(self, context: tuple[int, ...]) -> np.ndarray | None:
        """The drafter's, None where it has nothing to propose."""
        own = self._logits(1, context)
        if own[0] > 2.2:
            return None
        share = self._agreement
        logits: np.ndarray = share * self._logits(0, context) + (1 - share) * own
        return logits

    def _draft(self, context: tuple[int, ...]) -> Distribution | None:
        logits = self.draft_logits(context)
        if logits is None:
            return None
        return process(logits, self.params, EMPTY_TOKENS, EMPTY_TOKENS)


def context_of(token_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(token_ids[-NUM_CONTEXT:])


def decode(
    language: Language, prompt: Sequence[int], seed: int, max_tokens: int, stop: Sequence[int]
) -> list[int]:
    """What the target makes by itself with the coupled noise: greedy text, or coupled mode's."""
    text = list(prompt)
    while len(text) < len(prompt) + max_tokens:
        law = language.target(context_of(text))
        text.append(draw(law, seed, len(text), Purpose.COUPLED))
        if text[-1] in stop:
            break
    return text[len(prompt) :]


class ForgottenLaw(Distribution):
    """A deliberate fault: it knows the q that is sent, and nothing of Q that recovery asks for."""

    def prob(self, token_id: int) -> float:
        assert self.token_ids is not None
        return float(self.probs[0]) if token_id == self.token_ids[0] else 0.0

    def probs_of(self, token_ids: ArrayLike) -> ProbArray:
        return np.zeros(np.shape(token_ids), np.float32)


class BorrowedLaw(Distribution):
    """A deliberate fault: what is sent with the draft `drafted` is right, but recovery hears the Q
    of whatever drafter is there then."""

    __slots__ = ("_drafted", "_law", "_now")

    def __init__(self, drafted: int, law: Distribution, now: Callable[[], Distribution]) -> None:
        super().__init__(law.token_ids, law.probs)
        for name, value in zip(self.__slots__, (drafted, law, now), strict=True):
            object.__setattr__(self, name, value)  # it is frozen

    def prob(self, token_id: int) -> float:
        return (self._law if token_id == self._drafted else self._now()).prob(token_id)

    def probs_of(self, token_ids: ArrayLike) -> ProbArray:
        return self._now().probs_of(token_ids)


class ToyDrafter:
    """A DraftContext without a process: commands change it, `step` makes one event."""

    def __init__(
        self,
        language: Language,
        prompt: Sequence[int],
        seed: int,
        mode: VerificationMode,
        stop: Sequence[int],
        forget_judged: bool = False,
        confidence_stop: float = 0.0,
    ) -> None:
        self._language = language
        self._text = list(prompt)
        self._num_prompt = len(prompt)
        self._seed = seed
        self._split = mode is VerificationMode.SPLIT
        self._stop = stop
        self._forget_judged = forget_judged  # a deliberate fault: residual of Q = 0
        self._confidence_stop = confidence_stop
        self._paused = False
        self.branch = 0
        self.limit = 0
        self._exhausted = False

    def command(self, command: DrafterCommand) -> None:
        match command:
            case Allow(limit):
                self.limit = limit
                self._paused = False
            case Rollback(branch, length, token_ids):
                self._restart(branch, length)
                self._text += token_ids

    def succeed(self, lost: ToyDrafter, text: Sequence[int], *, is_exhausted: bool) -> None:
        """Go on where `lost`, whose worker has died, was heard of last: at the end of `text`."""
        self._text = list(text)
        self.branch, self.limit = lost.branch, lost.limit
        self._exhausted = is_exhausted  # pauses are forgotten, as in DraftContext.rebuild

    def _restart(self, branch: int, length: int) -> None:
        assert length <= len(self._text)
        del self._text[length:]
        self.branch = branch
        self._exhausted = self._paused = False

    @property
    def can_step(self) -> bool:
        return not (self._exhausted or self._paused) and len(self._text) < self.limit

    def step(self) -> list[DrafterEvent]:
        """The event of one step, and perhaps that the drafter pauses after it."""
        position = len(self._text)
        law = self._language.draft(context_of(self._text))
        stopped = position > self._num_prompt and self._text[-1] in self._stop
        if law is None or stopped:
            self._exhausted = True
            return [Exhausted(self.branch, position)]
        purpose = Purpose.DRAFT if self._split else Purpose.COUPLED
        token_id = draw(law, self._seed, position, purpose)
        self._text.append(token_id)
        q = np.array([law.prob(token_id)], np.float32)
        told = ForgottenLaw(np.array([token_id]), q) if self._forget_judged else law
        laws = (told,) if self._split else ()
        events: list[DrafterEvent] = [
            Drafted(branch=self.branch, position=position, token_ids=(token_id,), laws=laws)
        ]
        if float(law.probs.max()) < self._confidence_stop:
            self._paused = True
            events.append(Paused(self.branch, position + 1))
        return events


def rejection_at(
    language: Language, text: Sequence[int], seed: int, k: int, attempt: int
) -> Rejection:
    """What the cloud sends for the position after `text`: the Top-K, and a draw from the rest.

    k = 0: all of P.
    """
    probs = np.zeros(language.vocab_size, np.float32)
    law = language.target(context_of(text))
    probs[law.token_ids if law.token_ids is not None else slice(None)] = law.probs
    order = np.argsort(-probs, kind="stable").astype(np.int32)
    order = order[probs[order] > 0]
    kept, tail = order[: k or None], order[k or len(order) :]
    if not len(tail):
        return Rejection(kept, probs[kept] / probs[kept].sum())
    index = race(probs[tail], tail, seed, len(text), Purpose.TAIL, attempt)
    token_id = int(tail[index])
    tail_mass = float(probs[tail].sum(dtype=np.float64))
    return Rejection(
        token_ids=kept,
        probs=probs[kept],
        tail_mass=tail_mass,
        tail_token_id=token_id,
        tail_prob=float(probs[token_id]),
    )


def judge(
    language: Language, text: Sequence[int], seed: int, mode: VerificationMode, work: Work, k: int
) -> tuple[int, tuple[int, ...], Rejection | None]:
    """(number accepted, the cloud's own tokens, rejection) of one verification step."""
    text = list(text)
    for index, token_id in enumerate(work.token_ids):
        law = language.target(context_of(text))
        if mode is VerificationMode.COUPLED:
            drawn = draw(law, seed, len(text), Purpose.COUPLED)
            if drawn != token_id:
                return index, (drawn,), None
        else:
            u = uniform(seed, len(text), Purpose.ACCEPT)
            if not accept(u, law.prob(token_id), work.draft_probs[index]):
                return index, (), rejection_at(language, text, seed, k, 0)
        text.append(token_id)
    num_accepted = len(work.token_ids)
    if mode is VerificationMode.COUPLED:
        law = language.target(context_of(text))
        return num_accepted, (draw(law, seed, len(text), Purpose.COUPLED),), None
    if work.probe:
        return 0, (), rejection_at(language, text, seed, k, work.probe - 1)
    return num_accepted, (), None


def first_token(language: Language, text: Sequence[int], seed: int, mode: VerificationMode) -> int:
    purpose = Purpose.COUPLED if mode is VerificationMode.COUPLED else Purpose.FIRST
    return draw(language.target(context_of(text)), seed, len(text), purpose)


def random_prompt(rng: random.Random, vocab_size: int) -> list[int]:
    return [rng.randrange(1, vocab_size) for _ in range(rng.randint(2, 5))]
