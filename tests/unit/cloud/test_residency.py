"""Who is evicted when, without vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cloud_server.engine.engine_session import EngineSession
from cloud_server.engine.residency import Residency
from tests.support.engine_sessions import FakeRequest, make_session

BLOCK_SIZE = 32
RESIDENCY = Residency(block_size=BLOCK_SIZE, max_resident=4)


class Pool:
    """Free KV blocks; each session that is evicted gives `blocks_per_session` back."""

    def __init__(self, free: int, blocks_per_session: int = 1) -> None:
        self.free = free
        self.blocks_per_session = blocks_per_session


def evicted(
    held: list[EngineSession],
    pool: Pool,
    *,
    joining: Sequence[FakeRequest] = (),
    waiting: FakeRequest | None = None,
    residency: Residency = RESIDENCY,
) -> list[str]:
    names = []
    for session in residency.evictions(
        held,
        joining=joining,
        num_resident=len(held) + len(joining),
        waiting=waiting,
        num_free_blocks=lambda: pool.free,
    ):
        names.append(session.request.request_id)
        pool.free += pool.blocks_per_session
    return names


def held(*last_steps: int) -> list[EngineSession]:
    return [make_session(f"s{step}", last_step=step) for step in last_steps]


def request(num_tokens: int, *, num_computed: int = 0, num_drafts: int = 0) -> FakeRequest:
    return FakeRequest(
        "r",
        all_token_ids=[1] * num_tokens,
        num_computed_tokens=num_computed,
        spec_token_ids=[1] * num_drafts,
    )


def test_nobody_is_evicted_without_need() -> None:
    assert evicted(held(1, 2, 3), Pool(free=0)) == []
    assert evicted([], Pool(free=0), waiting=request(64)) == []


@pytest.mark.parametrize(
    ("joins", "num_blocks"),
    [
        (request(32, num_computed=31), 0),
        (request(32, num_computed=31, num_drafts=1), 1),
        (request(33, num_computed=32), 1),
        (request(33, num_computed=32, num_drafts=16), 1),
        (request(60, num_computed=59, num_drafts=16), 1),
        (request(160, num_computed=64), 3),  # what a prefill has still before it
    ],
)
def test_a_session_that_goes_on_needs_what_it_grows_by(joins: FakeRequest, num_blocks: int) -> None:
    assert evicted(held(1, 2, 3), Pool(free=num_blocks), joining=[joins]) == []
    assert len(evicted(held(1, 2, 3), Pool(free=0), joining=[joins])) == num_blocks


def test_the_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    two_blocks = request(32 + 64, num_computed=32)
    assert evicted(held(5, 2, 9), Pool(free=0), joining=[two_blocks]) == ["s2", "s5"]


def test_what_an_eviction_frees_is_looked_at_each_time() -> None:
    shared = Pool(free=0, blocks_per_session=0)  # its blocks are those of others, too
    assert evicted(held(3, 1, 2), shared, waiting=request(1)) == ["s1", "s2", "s3"]


def test_a_waiting_request_gets_room_for_all_its_tokens() -> None:
    two_blocks = request(64)
    assert evicted(held(1, 2), Pool(free=2), waiting=two_blocks) == []
    assert evicted(held(1, 2), Pool(free=1), waiting=two_blocks) == ["s1"]


def test_a_waiting_request_may_not_have_the_last_blocks() -> None:
    careful = Residency(block_size=BLOCK_SIZE, max_resident=4, watermark_blocks=1)
    assert evicted(held(1, 2), Pool(free=3), waiting=request(64), residency=careful) == []
    assert evicted(held(1, 2), Pool(free=2), waiting=request(64), residency=careful) == ["s1"]


def test_a_waiting_request_gets_a_place_in_a_full_batch() -> None:
    assert evicted(held(4, 3, 2, 1), Pool(free=100), waiting=request(1)) == ["s1"]
    joining = [request(2, num_computed=1)]
    assert evicted(held(3, 2, 1), Pool(free=100), joining=joining, waiting=request(1)) == ["s1"]
