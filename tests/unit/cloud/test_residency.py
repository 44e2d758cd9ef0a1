"""Who is evicted when, without vLLM."""

from __future__ import annotations

from cloud_server.engine.engine_session import EngineSession
from cloud_server.engine.residency import Residency
from tests.support.engine_sessions import make_session

RESIDENCY = Residency(block_size=32, max_draft_tokens=16, max_resident=4)
STEP_BLOCKS = 2  # the one begun, and one that 17 tokens may fill


class Pool:
    """Free KV blocks; each session that is evicted gives `blocks_per_session` back."""

    def __init__(self, free: int, blocks_per_session: int = 1) -> None:
        self.free = free
        self.blocks_per_session = blocks_per_session


def evicted(
    held: list[EngineSession],
    pool: Pool,
    *,
    num_resident: int | None = None,
    waiting: EngineSession | None = None,
) -> list[str]:
    names = []
    for session in RESIDENCY.evictions(
        held,
        num_resident=len(held) if num_resident is None else num_resident,
        waiting=waiting,
        num_free_blocks=lambda: pool.free,
    ):
        names.append(session.request.request_id)
        pool.free += pool.blocks_per_session
    return names


def held(*last_steps: int) -> list[EngineSession]:
    return [make_session(f"s{step}", last_step=step) for step in last_steps]


def test_nobody_is_evicted_without_need() -> None:
    assert evicted(held(1, 2, 3), Pool(free=0)) == []
    assert evicted(held(1, 2), Pool(free=STEP_BLOCKS), num_resident=3) == []
    assert evicted([], Pool(free=0), waiting=make_session(opened=False)) == []


def test_the_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    assert evicted(held(5, 2, 9), Pool(free=0), num_resident=4) == ["s2", "s5"]


def test_what_an_eviction_frees_is_looked_at_each_time() -> None:
    shared = Pool(free=0, blocks_per_session=0)  # its blocks are those of others, too
    assert evicted(held(3, 1, 2), shared, num_resident=4) == ["s1", "s2", "s3"]


def test_a_waiting_session_gets_room_for_all_its_tokens() -> None:
    waiting = make_session("new", opened=False, output=(1,) * 61)  # 64 tokens: 2 blocks
    assert evicted(held(1, 2), Pool(free=4), waiting=waiting) == []
    assert evicted(held(1, 2), Pool(free=3), waiting=waiting) == ["s1"]


def test_a_waiting_session_gets_a_place_in_a_full_batch() -> None:
    waiting = make_session("new", opened=False)
    assert evicted(held(4, 3, 2, 1), Pool(free=100), waiting=waiting) == ["s1"]
