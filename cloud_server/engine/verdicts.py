"""Verdicts: what is told to an edge, made from what steps and kept rows decided."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloud_server.engine.judging.verification import StepResult
from picospec.protocol.messages import FinishReason, Rejection, Verdict


@dataclass(slots=True)
class Tally:
    """A session's account since its last verdict; the next one tells it and starts it anew."""

    num_by_row: int = 0  # drafts accepted by a kept row: the next verdict begins with them
    num_forwards: int = 0
    arrived_s: float = 0.0  # of the newest draft judged

    def verdict(
        self,
        *,
        epoch: int,
        position: int,
        step_started_s: float,
        num_drafts: int = 0,
        num_accepted: int = 0,
        token_ids: Sequence[int] = (),
        rejection: Rejection | None = None,
        finish_reason: FinishReason | None = None,
        compute_us: int = 0,
        batch_size: int = 0,
        draft_budget: int = 0,
    ) -> Verdict:
        """The verdict on `num_drafts` drafts from `position` on and on what a row accepted before.

        A row accepted the draft at 6, then a step two of the three drafts from 7 on:

        >>> tally = Tally(num_by_row=1, num_forwards=1, arrived_s=5.0)
        >>> verdict = tally.verdict(
        ...     epoch=2, position=7, step_started_s=5.25, num_drafts=3, num_accepted=2
        ... )
        >>> verdict.position, verdict.num_accepted, verdict.num_draft_tokens, verdict.queue_us
        (6, 3, 4, 250000)
        >>> tally.num_by_row, tally.num_forwards
        (0, 0)
        """
        num_judged = self.num_by_row + num_drafts
        queue_s = step_started_s - self.arrived_s if num_judged else 0.0
        verdict = Verdict(
            epoch=epoch,
            position=position - self.num_by_row,
            num_accepted=self.num_by_row + num_accepted,
            token_ids=tuple(token_ids),
            rejection=rejection,
            finish_reason=finish_reason,
            num_draft_tokens=num_judged,
            queue_us=max(0, int(queue_s * 1e6)),
            compute_us=compute_us,
            num_forwards=self.num_forwards,
            batch_size=batch_size,
            draft_budget=draft_budget,
        )
        self.num_by_row = self.num_forwards = 0
        return verdict

    def conclude(
        self,
        result: StepResult,
        committed: Sequence[int],
        *,
        epoch: int,
        position: int,
        num_drafts: int,
        finish_reason: FinishReason | None,
        step_started_s: float,
        compute_us: int,
        batch_size: int = 0,
        draft_budget: int = 0,
    ) -> Verdict | None:
        """The verdict on a step that decided `result`; None if there is nothing to tell.

        `committed` are the tokens that vLLM took over: a stop token or the length limit cuts
        `result` short, and what was decided behind the cut does not count. A step that only
        computed a row (for the draft after a recovered token) tells nothing.

        Two of three drafts accepted, the second of them a stop token:

        >>> Tally().conclude(
        ...     StepResult(num_accepted=3, token_ids=(8,)), [4, 0], epoch=0, position=5,
        ...     num_drafts=3, finish_reason=FinishReason.STOP, step_started_s=0.0, compute_us=9,
        ... ).num_accepted
        2
        """
        num_accepted = min(result.num_accepted, len(committed))
        rejection = result.rejection if finish_reason is None else None
        if not (self.num_by_row or num_drafts or committed or rejection or finish_reason):
            return None
        return self.verdict(
            epoch=epoch,
            position=position,
            step_started_s=step_started_s,
            num_drafts=num_drafts,
            num_accepted=num_accepted,
            token_ids=committed[num_accepted:],
            rejection=rejection,
            finish_reason=finish_reason,
            compute_us=compute_us,
            batch_size=batch_size,
            draft_budget=draft_budget,
        )
