"""The seam between the API and the daemon: what the API must know and may use."""

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from edge_agent.generation import Generator
from edge_agent.metrics import DrafterState
from edge_agent.tokenizer import Tokenizer
from picospec.errors import PicoSpecError
from picospec.protocol.messages import ModelCard


@dataclass(frozen=True, slots=True)
class Health:
    """Whether answers can be given, and if not, why. Without a drafter they can: degraded."""

    cloud_reachable: bool
    model: str | None  # served by the cloud, None while it was never reached
    drafter: DrafterState
    problem: str = ""  # why no answer can be given

    @property
    def ok(self) -> bool:
        return not self.problem

    @property
    def status(self) -> str:
        if self.problem:
            return "unavailable"
        return "degraded" if self.drafter.problem else "ok"

    def body(self, active_generations: int) -> dict[str, Any]:
        return {
            "status": self.status,
            "problem": self.problem or self.drafter.problem or None,
            "cloud": {"reachable": self.cloud_reachable, "model": self.model},
            "drafter": asdict(self.drafter),
            "active_generations": active_generations,
        }


class Host(Protocol):
    """What stands behind the API; `server.EdgeHost` in the daemon."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def generator(self) -> Generator: ...

    def card(self) -> ModelCard:
        """The model served. Raises CloudUnavailable or ModelMismatch where there is none."""

    def health(self) -> Health: ...


@dataclass
class ScriptedHost:
    """A double that serves `model`, or raises `error`."""

    tokenizer: Tokenizer
    generator: Generator
    model: ModelCard
    error: PicoSpecError | None = None
    drafter: DrafterState = field(default_factory=lambda: DrafterState(alive=True))

    def card(self) -> ModelCard:
        if self.error is not None:
            raise self.error
        return self.model

    def health(self) -> Health:
        problem = str(self.error) if self.error is not None else ""
        return Health(self.error is None, self.model.model_id, self.drafter, problem)
