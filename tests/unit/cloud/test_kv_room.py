"""Who is let in by the KV cache's room, who waits and who is refused; time is told, not waited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from cloud_server.config import ServerConfig
from cloud_server.engine.interface import KVCacheSize
from cloud_server.kv_room import KVRoom, NoRoom, Refusal
from picospec.errors import CloudUnavailable, RemoteProtocolError
from tests.support.builders import make_open, token_array


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_room(num_tokens: int = 100, *, clock: Clock | None = None, **settings: Any) -> KVRoom:
    return KVRoom(
        KVCacheSize(num_tokens, settings.pop("block_size", 1)),
        ServerConfig(**settings),
        now=clock or Clock(),
    )


def started(wait: Awaitable[None]) -> asyncio.Task[None]:
    return asyncio.ensure_future(wait)  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# --- how much -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_prompt", "num_output", "max_tokens", "needed"),
    [
        (10, 0, 20, 32),  # 10 + 10, in blocks of 16
        (22, 0, 20, 32),
        (23, 0, 20, 48),
        (10, 12, 20, 32),  # resumed: 10 + 12, and half of the 8 that are left
        (10, 0, 400, 112),  # no more than 100 of the output
    ],
)
def test_prompt_and_a_share_of_the_output_are_reserved_in_blocks(
    num_prompt: int, num_output: int, max_tokens: int, needed: int
) -> None:
    room = make_room(480, block_size=16, output_share=0.5, output_reserve_max=100)
    request = make_open(
        prompt_token_ids=token_array(*[1] * num_prompt),
        output_token_ids=token_array(*[1] * num_output),
        max_tokens=max_tokens,
    )
    assert room.needed(request) == needed


@pytest.mark.parametrize(("max_tokens", "fits"), [(38, True), (39, False)])
def test_what_an_empty_cache_could_not_hold_to_its_end_is_refused(
    max_tokens: int, fits: bool
) -> None:
    room = make_room(48, block_size=16)
    request = make_open(prompt_token_ids=token_array(*[1] * 10), max_tokens=max_tokens)
    if fits:
        assert room.needed(request) == 32
        return
    with pytest.raises(RemoteProtocolError, match="more than the KV cache holds") as refusal:
        room.needed(request)
    assert refusal.value.field == "open.max_tokens"


# --- who waits ------------------------------------------------------------------------------


async def test_those_that_fit_are_let_in_at_once() -> None:
    room = make_room(100)
    await room.reserve("a", 60)
    await room.reserve("b", 40)
    assert (room.reserved_tokens, room.num_waiting) == (100, 0)
    room.release("a")
    room.release("a")
    assert room.reserved_tokens == 40


async def test_the_rest_waits_in_order_and_small_ones_do_not_overtake() -> None:
    room = make_room(100)
    await room.reserve("a", 60)
    large, small = started(room.reserve("large", 80)), started(room.reserve("small", 10))
    await settle()
    assert (large.done(), small.done(), room.num_waiting) == (False, False, 2)
    room.release("a")
    await settle()
    assert (large.done(), small.done()) == (True, True)
    assert room.reserved_tokens == 90


async def test_one_that_gives_up_lets_those_behind_it_in() -> None:
    room = make_room(100)
    await room.reserve("a", 60)
    large, small = started(room.reserve("large", 80)), started(room.reserve("small", 10))
    await settle()
    large.cancel()
    await settle()
    assert large.cancelled()
    assert small.done()
    assert (room.reserved_tokens, room.num_waiting) == (70, 0)


async def test_one_that_gives_up_as_it_is_let_in_gives_its_room_back() -> None:
    room = make_room(100)
    await room.reserve("a", 60)
    late = started(room.reserve("late", 80))
    await settle()
    room.release("a")
    late.cancel()
    await settle()
    room.release("late")  # as the end of every call does
    assert (room.reserved_tokens, room.num_waiting) == (0, 0)


# --- who is refused -------------------------------------------------------------------------


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    clock = Clock()
    room = make_room(100, clock=clock, queue_max=2)
    for _ in range(3):  # each holds all there is for 10 s
        await room.reserve("before", 100)
        clock.now_s += 10.0
        room.release("before")
    await room.reserve("a", 50)
    await room.reserve("b", 50)
    waiting = [started(room.reserve(key, 50)) for key in "cd"]
    await settle()
    with pytest.raises(NoRoom, match="2 generations wait") as refusal:
        await room.reserve("e", 50)
    assert refusal.value.reason is Refusal.QUEUE_FULL
    # Two run for 10 s each, so one ends every 5 s, and there are two ahead.
    assert refusal.value.retry_after_s == pytest.approx(15.0)
    assert room.num_waiting == 2
    for task in waiting:
        task.cancel()


async def test_a_wait_that_is_too_long_is_refused() -> None:
    room = make_room(100, queue_timeout_s=0.01)
    await room.reserve("a", 100)
    with pytest.raises(NoRoom, match=r"none within 0\.01 s") as refusal:
        await room.reserve("b", 1)
    assert refusal.value.reason is Refusal.QUEUE_TIMEOUT
    assert refusal.value.retry_after_s == 1.0
    assert room.num_waiting == 0


async def test_without_a_queue_nobody_waits() -> None:
    room = make_room(100, queue_max=0)
    await room.reserve("a", 100)
    with pytest.raises(NoRoom):
        await room.reserve("b", 1)


async def test_at_shutdown_those_that_wait_are_sent_away() -> None:
    room = make_room(100)
    await room.reserve("a", 100)
    waiting = started(room.reserve("b", 1))
    await settle()
    room.refuse("The server is shutting down")
    with pytest.raises(CloudUnavailable, match="shutting down"):
        await waiting
    room.release("a")
    assert (room.reserved_tokens, room.num_waiting) == (0, 0)
