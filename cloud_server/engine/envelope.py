"""What the engine's own processes say to each other: client -> scheduler -> worker and back.

vLLM's messages are fixed structs with one free-form field each way; the values below ride in
those. They are pickled: both ends are our own processes, started from the same code, over
sockets in a private directory.

    client    --Open, Deliveries-->    scheduler   SamplingParams.extra_args
    scheduler --VerificationStep-->    worker      attribute of SchedulerOutput
    worker    --StepOutcome-->         scheduler   attribute of ModelRunnerOutput
    scheduler --EngineEvents-->        client      EngineCoreOutput.kv_transfer_params
    scheduler --EngineStats-->         client      SchedulerStats.kv_connector_stats
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cloud_server.engine.interface import EngineEvent, EngineStats
from cloud_server.engine.judging.verification import StepKind, StepResult
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


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one engine step decides for one session."""

    kind: StepKind
    position: int  # of the first logits row
    num_drafts: int = 0  # those scheduled beyond are padding
    draft_probs: tuple[float, ...] = ()  # split, one for each draft
    attempt: int = 0  # number of the tail sample, for a probe
    keep_row: bool = False  # hand out the row after the last draft, if all are accepted


@dataclass(slots=True)
class VerificationStep:
    """The engine step as the worker must know it.

    `forced`: recovered tokens the scheduler appended since the session last ran, which the
    worker's copy of the session has not seen. A session without a plan computes KV only.
    """

    plans: dict[str, StepPlan] = field(default_factory=dict)
    forced: dict[str, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class StepOutcome:
    """What the worker decided, and what it took: the forward with its logits, and the judging."""

    results: dict[str, StepResult | NumericalError] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # each [1, vocab_size]
    padding: Padding | None = None  # what forwards are faster longer; with the first step
    forward_s: float = 0.0
    sampling_s: float = 0.0


def wrap(value: Open | Sequence[Delivery] | Sequence[EngineEvent] | EngineStats) -> dict[str, Any]:
    return {_KEY: pickle.dumps(value, pickle.HIGHEST_PROTOCOL)}


def unwrap(carrier: Mapping[str, Any] | None) -> Any:
    """The value wrapped in `carrier`, or None."""
    if not carrier or _KEY not in carrier:
        return None
    return pickle.loads(carrier[_KEY])
