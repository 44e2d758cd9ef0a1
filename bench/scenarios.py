"""What is measured, as data: conditions, the groups they are compared in, and two suites.

A *condition* is one system on one link at one temperature. A *group* holds the conditions that
are compared with each other: they share link and temperature, begin with the baseline, and run
on the same prompts in alternating order. No two groups share a setting, so a condition is
measured once in a suite.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Value = bool | int | str
Overrides = tuple[tuple[str, Value], ...]  # keys of the edge's [speculation] section, sorted


class System(enum.Enum):
    """Who makes the tokens. The values name them in results."""

    CLOUD_ONLY = "cloud_only"  # stock vLLM streams its tokens: the baseline
    ENGINE_PLAIN = "engine_plain"  # our cloud without drafts: what the hooks cost
    EDGE_ONLY = "edge_only"  # the drafter alone: a floor in quality, no link
    VANILLA = "vanilla"  # draft, send, verify, answer: in sequence, distributions whole
    AUTO = "auto"  # the settings as they come
    PICOSPEC = "picospec"  # the paper's scheme, everything on
    NO_PARALLEL_DRAFTING = "without_parallel_drafting"
    NO_FAST_VERIFICATION = "without_fast_verification"
    NO_SPLIT_REJECTION = "without_split_rejection"
    NEVER_WAITING = "never_waiting"  # coupled, and the cloud decodes while it has no drafts


# The paper's scheme: the cloud waits for the edge.
PAPER: Mapping[str, Value] = {"mode": "split", "assist": "never"}
# What each system changes in the edge's [speculation] section; systems that are not here have no
# pipeline.
SPECULATION: Mapping[System, Mapping[str, Value]] = {
    System.AUTO: {},
    System.VANILLA: {
        **PAPER,
        "parallel_draft": False,
        "fast_verify": False,
        "split_rejection": False,
    },
    System.PICOSPEC: PAPER,
    System.NO_PARALLEL_DRAFTING: {**PAPER, "parallel_draft": False},
    System.NO_FAST_VERIFICATION: {**PAPER, "fast_verify": False},
    System.NO_SPLIT_REJECTION: {**PAPER, "split_rejection": False},
    System.NEVER_WAITING: {"mode": "coupled", "assist": "always"},
}
ABLATIONS = (System.NO_PARALLEL_DRAFTING, System.NO_FAST_VERIFICATION, System.NO_SPLIT_REJECTION)
DRAFTS = ("int4", "int8")


@dataclass(frozen=True, slots=True)
class Condition:
    """One system as it is measured. `kbit_s` None is a link without a limit."""

    system: System
    draft: str | None  # one of DRAFTS; None where nothing is drafted
    rtt_ms: float
    kbit_s: float | None = None
    temperature: float = 0.0
    overrides: Overrides = ()  # over those of the system

    @property
    def speculation(self) -> dict[str, Value]:
        """The keys of [speculation] that are not at their default."""
        return {**SPECULATION.get(self.system, {}), **dict(self.overrides)}

    @property
    def link(self) -> tuple[float, float | None, float]:
        """What the conditions of a group share: rtt_ms, kbit_s, temperature."""
        return self.rtt_ms, self.kbit_s, self.temperature

    @property
    def name(self) -> str:
        """Unique within a group.

        >>> Condition(System.PICOSPEC, "int4", 20, overrides=fixed(2)).name
        'picospec int4 draft_length=2'
        """
        words = [self.system.value, *([self.draft] if self.draft else [])]
        return " ".join(words + [f"{key}={value}" for key, value in self.overrides])


@dataclass(frozen=True, slots=True)
class Group:
    """Conditions to be compared; the first is the baseline, stock vLLM on the same link."""

    name: str
    conditions: tuple[Condition, ...]
    num_prompts: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Suite:
    name: str
    groups: tuple[Group, ...]
    budget_min: float  # it must be done by then
    cost_cycles: int  # repetitions of the measurement of costs

    @property
    def conditions(self) -> Iterator[Condition]:
        for group in self.groups:
            yield from group.conditions


def fixed(draft_length: int) -> Overrides:
    """At most `draft_length` drafts to a forward; the window stays as it is by default."""
    return (("draft_length", draft_length),)


# The paper's example, and its truncation of P, which changes the law of the output.
TOP_10: Overrides = (("sparse_k", 10),)
TRUNCATED_10: Overrides = (("exact", False), ("sparse_k", 10))
ADAPTIVE: Overrides = (("control", "adaptive"),)  # in results of before there was System.AUTO


def group(
    name: str,
    link: tuple[float, float | None, float],
    systems: tuple[tuple[System, Overrides], ...],
    *,
    num_prompts: int,
    max_tokens: int,
    drafts: tuple[str, ...] = DRAFTS,
) -> Group:
    """The baseline, then every system with every draft (those without one: once)."""
    rtt_ms, kbit_s, temperature = link
    conditions = [Condition(System.CLOUD_ONLY, None, rtt_ms, kbit_s, temperature)]
    for system, overrides in systems:
        for draft in (None,) if system is System.ENGINE_PLAIN else drafts:
            conditions.append(Condition(system, draft, rtt_ms, kbit_s, temperature, overrides))
    return Group(name, tuple(conditions), num_prompts, max_tokens)


# -- the suites ------------------------------------------------------------------------------------

RTTS_MS = (0.0, 20.0, 50.0, 100.0, 200.0)
PLAIN_RTTS_MS = (0.0, 100.0)
SWEEP_RTT_MS = 20.0  # of draft lengths, switches, temperatures and bandwidths
SWEPT = tuple(range(1, 9))
SWEPT_ELSEWHERE = (1, 2, 4, 8)
# Without sampling there is no distribution to send whole, hence not greedy.
ABLATION_TEMPERATURE = 0.7
ABLATED = tuple((system, ()) for system in (System.PICOSPEC, *ABLATIONS, System.VANILLA))
SPARSE = (
    (System.PICOSPEC, TOP_10),
    (System.NO_FAST_VERIFICATION, TOP_10),
    (System.PICOSPEC, TRUNCATED_10),
)
SPLIT_OR_DENSE = ((System.PICOSPEC, ()), (System.NO_SPLIT_REJECTION, ()))


def _systems_at(rtt_ms: float) -> tuple[tuple[System, Overrides], ...]:
    """What is compared at one RTT, greedily."""
    lengths = SWEPT if rtt_ms == SWEEP_RTT_MS else SWEPT_ELSEWHERE
    return (
        *(((System.ENGINE_PLAIN, ()),) if rtt_ms in PLAIN_RTTS_MS else ()),
        *(((System.EDGE_ONLY, ()),) if rtt_ms == 0.0 else ()),
        (System.PICOSPEC, ()),
        (System.NEVER_WAITING, ()),
        (System.VANILLA, ()),
        *((System.PICOSPEC, fixed(length)) for length in lengths),
        (System.AUTO, ()),
    )


def full() -> Suite:
    """Every table of the report."""
    rtts = [
        group(
            f"RTT {rtt_ms:g} ms", (rtt_ms, None, 0.0), _systems_at(rtt_ms),
            num_prompts=6, max_tokens=64,
        )
        for rtt_ms in RTTS_MS
    ]  # fmt: skip
    sampled = ((System.PICOSPEC, ()), (System.NEVER_WAITING, ()))
    rtt_ms, warm = SWEEP_RTT_MS, ABLATION_TEMPERATURE
    return Suite(
        "full",
        (
            *rtts,
            group(
                "ablation", (rtt_ms, None, warm),
                (*ABLATED, *SPARSE, (System.NEVER_WAITING, ())),
                num_prompts=8, max_tokens=64,
            ),
            group(
                "temperature 1", (rtt_ms, None, 1.0), sampled, num_prompts=8, max_tokens=64
            ),
            group(
                "1 Mbit/s", (rtt_ms, 1000.0, warm), SPLIT_OR_DENSE, num_prompts=4, max_tokens=48
            ),
            # A whole distribution takes half a minute here, hence the few tokens.
            group(
                "50 kbit/s", (rtt_ms, 50.0, warm), SPLIT_OR_DENSE, num_prompts=2, max_tokens=10
            ),
        ),
        budget_min=60.0,
        cost_cycles=10,
    )  # fmt: skip


def quick() -> Suite:
    """The main comparison and the switches, a few tokens of each."""
    systems = ((System.PICOSPEC, ()), (System.NEVER_WAITING, ()), (System.AUTO, ()))
    return Suite(
        "quick",
        (
            group("RTT 20 ms", (20.0, None, 0.0), systems, num_prompts=2, max_tokens=32),
            group("RTT 100 ms", (100.0, None, 0.0), systems, num_prompts=2, max_tokens=32),
            group(
                "ablation", (SWEEP_RTT_MS, None, ABLATION_TEMPERATURE), ABLATED,
                num_prompts=2, max_tokens=32,
            ),
        ),
        budget_min=5.0,
        cost_cycles=2,
    )  # fmt: skip


SUITES = {"full": full, "quick": quick}
