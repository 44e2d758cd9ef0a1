"""What the engine's own processes say to each other: client -> scheduler -> worker and back.

    client    --Open, Deliveries, Wake-->  scheduler   SamplingParams.extra_args
    scheduler --VerificationStep-->        worker      attribute of SchedulerOutput
    worker    --StepOutcome-->             scheduler   attribute of ModelRunnerOutput
    scheduler --EngineReport-->            client      a socket of our own (reports.py)

vLLM makes the request, the step and the runner's output itself and offers no way to choose
their classes: what we add rides in the request's field for free-form arguments and on the other
two (dataclasses) as an attribute. vLLM's way back belongs to its steps, and a report may come
between two.
Values are pickled: both ends are our own processes, started from the same code, over sockets in a
private directory.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cloud_server.engine.interface import EngineEvent, EngineStats
from cloud_server.engine.judging.verification import StepResult
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


@dataclass(frozen=True, slots=True)
class Wake:
    """The time until which the engine wanted to wait for drafts is over."""

    until_s: float  # as in EngineReport.wake_s


@dataclass(slots=True)
class StepOutcome:
    """What the worker decided, and what it took: the forward with its logits, and the judging."""

    results: dict[str, StepResult | NumericalError] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # each [1, vocab_size]
    step_s: Mapping[int, float] | None = None  # by tokens, as measured; with the first step
    forward_s: float = 0.0
    sampling_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What happened to sessions since the last report, in order, and where the engine stands."""

    events: Mapping[str, Sequence[EngineEvent]]  # by session key
    stats: EngineStats
    wake_s: float = 0.0  # when to send a Wake (time.monotonic); 0: not at all
    step_ends_s: float = 0.0  # when the step that follows is expected to end; 0: nobody knows


def wrap(value: Open | Sequence[Delivery] | Wake) -> dict[str, Any]:
    """`value` as the `extra_args` of a request."""
    return {_KEY: pickle.dumps(value, pickle.HIGHEST_PROTOCOL)}


def unwrap(extra_args: Mapping[str, Any] | None) -> Open | list[Delivery] | Wake | None:
    """The value in `extra_args`; None for a request of vLLM's own."""
    if not extra_args or _KEY not in extra_args:
        return None
    value: Open | list[Delivery] | Wake = pickle.loads(extra_args[_KEY])
    return value
