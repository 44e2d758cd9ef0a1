"""An event simulation of one session: drafter, two wires, engine, and chance.

The rules of this file:
1. State changes in the handlers of events only (`clock_and_wires`), which belong to the two ends
   (`edge`, `cloud`).
2. Whether a draft will be accepted is drawn when it is made, from `seed` alone, or, where a `Text`
   is replayed, on record. A text begins with its request, chance with a first token at both ends.

`prediction` computes the mean of the same system without playing it.
"""

from dataclasses import dataclass

from picospec.performance.costs import Acceptance, Costs, Network, Scheme, Text, check_acceptance
from picospec.performance.simulation.clock_and_wires import World
from picospec.performance.simulation.cloud import Cloud
from picospec.performance.simulation.edge import Edge

EVENTS_PER_RUN_MAX = 100_000_000


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a simulated session measured. A round is what one verdict ends."""

    tokens_per_s: float
    round_ms: float  # between verdicts
    verify_ms: float  # T_verify: the engine's time, a round
    draft_ms: float  # T_draft: the drafter's time, a round
    forwards_per_token: float
    accepted_per_verdict: float
    bytes_up_per_token: float
    bytes_down_per_token: float


def simulate(
    costs: Costs, scheme: Scheme, link: Network, alpha: Acceptance, num_tokens: int, seed: int
) -> Prediction:
    """Play until `num_tokens` are committed at the edge. Raises ConfigError for a bad `alpha`."""
    simulation = Simulation(costs, scheme, link, alpha, seed)
    simulation.run(num_tokens=num_tokens)
    return simulation.prediction()


def replay_s(costs: Costs, scheme: Scheme, link: Network, text: Text) -> float:
    """Seconds from the first token of `text` at the edge to its last."""
    simulation = Simulation(costs, scheme, link, text, seed=0)
    simulation.run(num_tokens=0)
    first_ms = simulation.world.now_ms
    simulation.run(num_tokens=len(text.accepted) - 1)
    return (simulation.world.now_ms - first_ms) / 1e3


class Simulation:
    """A session that can be watched, and changed, while it runs: `run` on, then set `costs`,
    `link` or `alpha` of its `world`, then `run` again."""

    def __init__(
        self, costs: Costs, scheme: Scheme, link: Network, alpha: Acceptance | Text, seed: int
    ) -> None:
        """Raises ConfigError for a bad `alpha`."""
        if not isinstance(alpha, Text):
            check_acceptance(alpha)
        self.world = World(costs, scheme, link, alpha, seed)
        self._edge, cloud = Edge(self.world), Cloud(self.world)
        self.world.deliver, self.world.hear = cloud.receive, self._edge.hear
        if isinstance(alpha, Text):
            self._edge.open(alpha.edge_prefill_ms)
            cloud.open(link.rtt_ms / 2 + alpha.cloud_prefill_ms)
        else:
            self._edge.begin()

    @property
    def num_tokens(self) -> int:
        """Committed at the edge, behind the first."""
        return self._edge.committed

    def run(self, *, num_tokens: int | None = None, until_ms: float = float("inf")) -> None:
        """Until the edge has `num_tokens` in all, or to a time, whatever comes first."""
        world = self.world
        for _ in range(EVENTS_PER_RUN_MAX):
            if num_tokens is not None and self.num_tokens >= num_tokens:
                return
            if world.next_ms > until_ms:
                world.now_ms = until_ms
                return
            world.play_next()
        raise AssertionError("a run without end")

    def prediction(self) -> Prediction:
        """Of all that was played so far."""
        counts, now_ms, tokens = self.world.counts, self.world.now_ms, max(1, self.num_tokens)
        verdicts = max(1, counts.verdicts)
        return Prediction(
            tokens_per_s=1e3 * self.num_tokens / now_ms if now_ms else 0.0,
            round_ms=now_ms / verdicts,
            verify_ms=counts.verify_ms / verdicts,
            draft_ms=counts.draft_ms / verdicts,
            forwards_per_token=counts.forwards / tokens,
            accepted_per_verdict=counts.accepted / verdicts,
            bytes_up_per_token=counts.bytes_up / tokens,
            bytes_down_per_token=counts.bytes_down / tokens,
        )
