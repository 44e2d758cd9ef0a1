"""Residency: which sessions hold KV cache, and which one gives it up.

A session becomes resident when vLLM first schedules it and stays so while it is held, waiting for
its edge, at no cost but memory. vLLM preempts a running request only for another running one, so
without eviction a new session would wait for ever behind held ones. An evicted session is
prefilled again (from the prefix cache, where that still has it) when its edge next sends work.
"""

from collections.abc import Callable, Iterator

from cloud_server.engine.engine_session import EngineSession


class Residency:
    """Evicts held sessions, the least recently used first, and none without need."""

    def __init__(self, *, block_size: int, max_draft_tokens: int, max_resident: int) -> None:
        """`block_size` in tokens; `max_resident` is the number of requests in vLLM's batch."""
        self._block_size = block_size
        self._max_resident = max_resident
        # One that a session has begun, and those that its drafts and the bonus token fill.
        self._step_blocks = 1 + self._blocks(max_draft_tokens + 1)

    def evictions(
        self,
        held: list[EngineSession],
        *,
        num_resident: int,
        waiting: EngineSession | None,
        num_free_blocks: Callable[[], int],
    ) -> Iterator[EngineSession]:
        """Sessions to evict, so that the others and `waiting`, the first to be admitted, have room.

        The caller evicts each before it asks for the next: what that frees depends on what the
        session shares with others.
        """
        if not held:
            return
        needed = (num_resident - len(held)) * self._step_blocks
        if waiting is not None:
            needed += self._blocks(waiting.request.num_tokens) + self._step_blocks
        candidates = sorted(held, key=lambda session: session.last_step, reverse=True)
        while candidates and (
            num_free_blocks() < needed
            or (waiting is not None and num_resident >= self._max_resident)
        ):
            num_resident -= 1
            yield candidates.pop()

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
