"""What is counted of one generation, without a pipeline."""

from __future__ import annotations

from edge_agent.accounting import Account
from edge_agent.generation import GenerationStats
from edge_agent.link import ScriptedLink
from edge_agent.observer import NullObserver
from picospec.protocol.messages import Verdict
from tests.support.builders import make_opened, make_verdict


class Recorder(NullObserver):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def verdict(self, verdict: Verdict) -> None:
        self.seen.append(("verdict", verdict.num_accepted))

    def rollback(self) -> None:
        self.seen.append(("rollback", 1))

    def stale(self, num_tokens: int) -> None:
        self.seen.append(("stale", num_tokens))

    def resumed(self) -> None:
        self.seen.append(("resumed", 1))

    def bytes_up(self, num_bytes: int) -> None:
        self.seen.append(("up", num_bytes))

    def bytes_down(self, num_bytes: int) -> None:
        self.seen.append(("down", num_bytes))


def new_account() -> tuple[Account, Recorder]:
    recorder = Recorder()
    return Account(GenerationStats(), recorder), recorder


def test_verdicts_add_up() -> None:
    account, recorder = new_account()
    account.received(make_verdict(num_accepted=2, num_draft_tokens=3, num_forwards=1))
    account.received(make_verdict(num_accepted=1, num_draft_tokens=1, num_forwards=2))
    stats = account.stats
    assert (stats.verdicts, stats.forwards) == (2, 3)
    assert (stats.drafted_tokens, stats.accepted_tokens) == (4, 3)
    assert recorder.seen == [("verdict", 2), ("verdict", 1)]


def test_only_a_confirmed_opening_after_a_loss_is_a_resumption() -> None:
    account, recorder = new_account()
    account.received(make_opened(cached_prompt_tokens=5))
    assert (account.stats.cached_prompt_tokens, account.stats.resumes) == (5, 0)
    account.resuming()
    account.resuming()  # the first attempt came to nothing
    account.received(make_opened())
    account.received(make_opened())
    assert account.stats.resumes == 1
    assert recorder.seen == [("resumed", 1)]


def test_stale_tokens_are_reported_as_they_grow() -> None:
    account, recorder = new_account()
    for stale_tokens in (0, 3, 3, 7):
        account.rolled_back(stale_tokens)
    assert account.stats.rollbacks == 4
    assert [seen for seen in recorder.seen if seen[0] == "stale"] == [("stale", 3), ("stale", 4)]


def test_bytes_of_several_streams_add_up() -> None:
    account, recorder = new_account()
    link = ScriptedLink()
    first, second = link.open_stream("r"), link.open_stream("r")
    first.bytes_up, first.bytes_down = 10, 0
    account.moved(first)
    account.moved(first)
    first.bytes_down = 4
    account.closed(first)
    second.bytes_up = 3
    account.moved(second)
    assert (account.stats.bytes_up, account.stats.bytes_down) == (13, 4)
    assert recorder.seen == [("up", 10), ("down", 4), ("up", 3)]
