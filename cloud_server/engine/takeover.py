"""Takeover: whether the cloud decodes a session's next token itself while no draft is queued.

The edge names the policy in its Open (`AssistPolicy`); the scheduler asks it for every session
that has nothing else to do in a step. Exact in coupled mode only, since a split session's tokens
need the edge: `picospec/protocol/validation.py` refuses every other combination.
"""

from typing import Protocol

from picospec.protocol.messages import AssistPolicy


class Takeover(Protocol):
    def is_due(self, *, engine_idle: bool) -> bool:
        """Whether the next step may decode without a draft.

        `engine_idle`: no session's edge waits for a judgement or a prefill.
        """


class NeverTakeOver:
    def is_due(self, *, engine_idle: bool) -> bool:
        del engine_idle
        return False


class TakeOverWhenIdle:
    def is_due(self, *, engine_idle: bool) -> bool:
        return engine_idle


class AlwaysTakeOver:
    def is_due(self, *, engine_idle: bool) -> bool:
        del engine_idle
        return True


TAKEOVERS: dict[AssistPolicy, Takeover] = {
    AssistPolicy.NEVER: NeverTakeOver(),
    AssistPolicy.IDLE: TakeOverWhenIdle(),
    AssistPolicy.ALWAYS: AlwaysTakeOver(),
}
