"""The cells of the floor, as data.

A *load* is what is asked of both sides, over which link. A *contender* is an edge that serves it;
the baseline, stock vLLM, serves it too, through the same relay. A *group* holds a load and its
contenders. A *cell* is one contender's figures under one load.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from bench.scenarios import Overrides

WANTED = 0.97  # the ratio that the default settings should reach, where nothing else is said
FLOOR_MIN = 0.95  # of stock vLLM's tokens per second: a cell below it fails the run


class Kind(enum.Enum):
    SINGLE = "single"  # one chat: tokens/s after the first commit
    CHATS = "chats"  # many on one edge: tokens/s of all, while all of them are decoded
    FLEET = "fleet"  # one chat on each of many emulated edges
    TURNS = "turns"  # three turns of a chat, with a prefix cache on both sides
    CHANGE = "change"  # one chat; tokens/s from some seconds after something has changed


class Change(enum.Enum):
    NONE = "none"
    LINK = "link"  # the round trip goes from 20 to 200 ms
    STOP = "stop"  # the drafter is stopped
    CROWD = "crowd"  # 15 other chats begin


@dataclass(frozen=True, slots=True)
class Load:
    kind: Kind
    rtt_ms: float
    temperature: float = 0.0
    max_tokens: int = 64
    chats: int = 1
    prompt_tokens: int = 0  # 0: one of the benchmark's own prompts, as long as it is
    prompt_kind: str = ""  # of the own prompts; "": any
    change: Change = Change.NONE

    @property
    def name(self) -> str:
        """
        >>> Load(Kind.CHATS, 20.0, chats=4).name
        'chats=4 rtt=20 T=0'
        """
        number = f"={self.chats}" if self.kind in (Kind.CHATS, Kind.FLEET) else ""
        prompt = f" prompt={self.prompt_tokens}" if self.prompt_tokens else ""
        prompt += f" {self.prompt_kind}" if self.prompt_kind else ""
        change = f" {self.change.value}" if self.change is not Change.NONE else ""
        end = f" rtt={self.rtt_ms:g} T={self.temperature:g}"
        return f"{self.kind.value}{number}{change}{prompt}{end}"


@dataclass(frozen=True, slots=True)
class Contender:
    """An edge. `drafter`: a draft model, "ngram", "stopped" (int8, under SIGSTOP) or "replay"."""

    drafter: str
    settings: Overrides = ()  # (): as they come
    alpha: float = 0.0  # of a replay
    token_ms: float = 0.0

    @property
    def name(self) -> str:
        """
        >>> Contender("replay", alpha=0.9, token_ms=10).name, Contender("int8", SPLIT).name
        ('replay alpha=0.9', 'int8 assist=never mode=split')
        """
        alpha = [f"alpha={self.alpha:g}"] if self.alpha else []
        return " ".join([self.drafter, *alpha, *(f"{key}={it}" for key, it in self.settings)])

    @property
    def is_default(self) -> bool:
        return not self.settings


@dataclass(frozen=True, slots=True)
class Group:
    load: Load
    contenders: tuple[Contender, ...]
    wanted: float = WANTED

    @property
    def cells(self) -> Iterator[tuple[str, Contender]]:
        for contender in self.contenders:
            yield f"{self.load.name} {contender.name}", contender


# What the defaults are compared with, beside stock vLLM.
SPLIT: Overrides = (("assist", "never"), ("mode", "split"))
COUPLED: Overrides = (("assist", "always"), ("mode", "coupled"))
FIXED = (SPLIT, COUPLED)

RTTS_MS = (0.0, 20.0, 50.0, 100.0, 200.0, 500.0)
TEMPERATURES = (0.0, 0.7, 1.0)
MODELS = ("int4", "int8")
DRAFTERS = (*MODELS, "ngram", "stopped")
CHATS = (4, 8, 16, 32)
FLEETS = (1, 4, 8, 16, 32)
FLEET_RTTS_MS = (20.0, 100.0)
ALPHAS = (0.7, 0.9)
REPLAY_TOKEN_MS = 10.0  # between int4's pace and int8's on the machines measured so far
PROMPTS = (30, 1000, 4000)
USUAL_RTT_MS = 20.0
CROWD_TOKENS = 128  # of each of many chats
FEW = 4  # edges, of which each should gain
CHANGE_TOKENS = 1500  # more than any side makes while it is looked at


def with_fixed(*drafters: str) -> tuple[Contender, ...]:
    """Each with the default settings, draft models with the fixed ones, too."""
    defaults = [Contender(drafter) for drafter in drafters]
    fixed = [
        Contender(drafter, settings)
        for drafter in drafters
        if drafter in MODELS
        for settings in FIXED
    ]
    return (*defaults, *fixed)


def grid(*, quick: bool = False) -> tuple[Group, ...]:
    """All groups, or a few that show whether anything is badly wrong."""
    models = tuple(map(Contender, MODELS))
    single = (
        Group(Load(Kind.SINGLE, rtt_ms, temperature), with_fixed(*DRAFTERS))
        for temperature in ((0.0,) if quick else TEMPERATURES)
        for rtt_ms in ((20.0, 200.0) if quick else RTTS_MS)
    )
    chats = (
        Group(Load(Kind.CHATS, USUAL_RTT_MS, max_tokens=CROWD_TOKENS, chats=each), models)
        for each in ((4, 16) if quick else CHATS)
    )
    fleet = (
        Group(
            Load(Kind.FLEET, rtt_ms, max_tokens=CROWD_TOKENS, chats=each),
            (Contender("replay", alpha=alpha, token_ms=REPLAY_TOKEN_MS),),
            wanted=1.3 if alpha >= 0.9 and each <= FEW else 1.0,
        )
        for rtt_ms in ((20.0,) if quick else FLEET_RTTS_MS)
        for each in ((1, 8) if quick else FLEETS)
        for alpha in ALPHAS
    )
    change = (
        Group(
            Load(Kind.CHANGE, USUAL_RTT_MS, max_tokens=CHANGE_TOKENS, change=each),
            with_fixed("int8"),
        )
        for each in (Change.LINK, Change.STOP, Change.CROWD)
    )
    # A contender a group: whoever comes second would find the prompt in the prefix cache.
    turns = (
        Group(Load(Kind.TURNS, USUAL_RTT_MS, prompt_tokens=each), (contender,))
        for each in ((30, 1000) if quick else PROMPTS)
        for contender in (models[1:] if quick else models)
    )
    return (*single, *chats, *fleet, *(() if quick else change), *turns)


# A pair of two models: what is wanted of it, by temperature and round trip.
PAIR_WANTED = {
    0.0: {20.0: 3.6, 50.0: 3.5, 200.0: 3.0},
    0.7: {20.0: 3.2, 50.0: 3.1, 200.0: 2.6},
}
PAIR_TOKENS = 64


def pair_grid() -> tuple[Group, ...]:
    """One chat and four, about code."""
    contenders = (Contender("int4"),)
    groups = []
    for temperature, wanted in PAIR_WANTED.items():
        for rtt_ms, ratio in wanted.items():
            one = Load(Kind.SINGLE, rtt_ms, temperature, PAIR_TOKENS, prompt_kind="code")
            four = Load(Kind.CHATS, rtt_ms, temperature, PAIR_TOKENS, chats=4, prompt_kind="code")
            groups += [Group(one, contenders, ratio), Group(four, contenders)]
    return tuple(groups)
