"""Residency: which sessions hold KV cache, and which one gives it up.

A session becomes resident when vLLM first schedules it and stays so while it is held, waiting for
its edge, at no cost but memory. vLLM preempts a running request only for another running one, so
without eviction a new session would wait for ever behind held ones. An evicted session is
prefilled again (from the prefix cache, where that still has it) when its edge next sends work.
"""

from collections.abc import Callable, Iterable, Iterator

from cloud_server.engine.engine_session import EngineRequest, EngineSession


class Residency:
    """Evicts held sessions, the least recently used first, and none without need."""

    def __init__(self, *, block_size: int, max_resident: int, watermark_blocks: int = 0) -> None:
        """`block_size` in tokens; `max_resident` is the number of requests in vLLM's batch.

        vLLM admits nobody to the last `watermark_blocks`.
        """
        self._block_size = block_size
        self._max_resident = max_resident
        self._watermark_blocks = watermark_blocks

    def evictions(
        self,
        held: Iterable[EngineSession],
        *,
        joining: Iterable[EngineRequest],
        num_resident: int,
        waiting: EngineRequest | None,
        num_free_blocks: Callable[[], int],
    ) -> Iterator[EngineSession]:
        """Sessions to evict, so that the coming step has room. Looks at `held` only if it must.

        `joining` are the resident requests that the step forwards, with their drafts. `waiting` is
        the request that vLLM will try to admit; it admits none behind one that does not fit.
        The caller evicts each session before it asks for the next: what that frees depends on what
        the session shares with others.
        """
        needed = sum(map(self._growth, joining))
        if waiting is not None:
            needed += self._blocks(waiting.num_tokens) + self._watermark_blocks
        candidates: list[EngineSession] | None = None
        while num_free_blocks() < needed or (
            waiting is not None and num_resident >= self._max_resident
        ):
            if candidates is None:
                candidates = sorted(held, key=lambda session: session.last_step, reverse=True)
            if not candidates:
                return
            num_resident -= 1
            yield candidates.pop()

    def _growth(self, request: EngineRequest) -> int:
        """Most blocks that a step adds to `request`: what is not computed yet, and its drafts."""
        num_tokens = request.num_tokens + len(request.spec_token_ids)
        return self._blocks(num_tokens) - self._blocks(request.num_computed_tokens)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
