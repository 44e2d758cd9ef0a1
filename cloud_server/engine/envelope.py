"""What the engine's own processes say to each other: client -> scheduler -> worker and back.

    client    --Open, Deliveries-->    scheduler   SamplingParams.extra_args
    scheduler --VerificationStep-->    worker      attribute of SchedulerOutput
    worker    --StepOutcome-->         scheduler   attribute of ModelRunnerOutput
    scheduler --EngineReport-->        client      VerificationOutputs, our subclass

vLLM makes the request, the step and the runner's output itself and offers no way to choose
their classes: what we add rides in the request's field for free-form arguments and on the other
two (dataclasses) as an attribute. The way back to the client has a message of our own.
Values are pickled: both ends are our own processes, started from the same code, over sockets in a
private directory.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
import torch
from vllm.v1.engine import EngineCoreOutputs

from cloud_server.engine.interface import EngineEvent, EngineStats
from cloud_server.engine.judging.verification import StepResult
from cloud_server.engine.step_padding import Padding
from picospec.errors import NumericalError
from picospec.protocol.messages import Draft, Open

_KEY = "picospec"
MIN_STEP_TOKENS = "picospec_min_step_tokens"  # in vLLM's additional_config


@dataclass(frozen=True, slots=True)
class Delivery:
    """A Draft for a session, and when it reached the cloud, on the host's monotonic clock."""

    session_key: str
    draft: Draft
    arrived_s: float


@dataclass(slots=True)
class StepOutcome:
    """What the worker decided, and what it took: the forward with its logits, and the judging."""

    results: dict[str, StepResult | NumericalError] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # each [1, vocab_size]
    padding: Padding | None = None  # which steps are faster when padded; with the first step
    forward_s: float = 0.0
    sampling_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What a step brought: its sessions' events, in order, and where the engine stands."""

    events: dict[str, list[EngineEvent]]  # by session key
    stats: EngineStats


class VerificationOutputs(EngineCoreOutputs):
    """vLLM's outputs of a step with our report at their end.

    Encoded as an array whose end may be missing, so that a decoder of this class reads vLLM's
    own messages as well, and one of vLLM's class reads these.
    """

    report: bytes = b""

    @classmethod
    def of(cls, outputs: EngineCoreOutputs, report: EngineReport) -> Self:
        pickled = pickle.dumps(report, pickle.HIGHEST_PROTOCOL)
        return cls(**msgspec.structs.asdict(outputs), report=pickled)

    def open_report(self) -> EngineReport | None:
        report: EngineReport | None = pickle.loads(self.report) if self.report else None
        return report


def wrap(value: Open | Sequence[Delivery]) -> dict[str, Any]:
    """`value` as the `extra_args` of a request."""
    return {_KEY: pickle.dumps(value, pickle.HIGHEST_PROTOCOL)}


def unwrap(extra_args: Mapping[str, Any] | None) -> Open | list[Delivery] | None:
    """The value in `extra_args`; None for a request of vLLM's own."""
    if not extra_args or _KEY not in extra_args:
        return None
    value: Open | list[Delivery] = pickle.loads(extra_args[_KEY])
    return value
