"""What is counted of one generation: its `GenerationStats`, and what an observer is told."""

from edge_agent.generation import GenerationStats
from edge_agent.link import Stream
from edge_agent.observer import PipelineObserver
from picospec.protocol.messages import CloudFrame, Opened


class Account:
    """Keeps `stats` and tells `observer`."""

    def __init__(self, stats: GenerationStats, observer: PipelineObserver) -> None:
        self.stats = stats
        self.observer = observer
        self._counted_bytes = (0, 0)  # of the current stream: up, down
        self._stale_tokens = 0  # reported so far
        self._resuming = False

    def received(self, frame: CloudFrame) -> None:
        """To be told before the session is."""
        stats = self.stats
        if isinstance(frame, Opened):
            stats.cached_prompt_tokens = frame.cached_prompt_tokens
            if self._resuming:
                self._resuming = False
                stats.resumes += 1
                self.observer.resumed()
            return
        stats.verdicts += 1
        stats.forwards += frame.num_forwards
        stats.drafted_tokens += frame.num_draft_tokens
        stats.accepted_tokens += frame.num_accepted
        self.observer.verdict(frame)

    def rolled_back(self, stale_tokens: int) -> None:
        """The chain was given up; `stale_tokens` is the session's count since it began."""
        self.stats.rollbacks += 1
        self.observer.rollback()
        if stale_tokens > self._stale_tokens:
            self.observer.stale(stale_tokens - self._stale_tokens)
            self._stale_tokens = stale_tokens

    def moved(self, stream: Stream) -> None:
        """Count what `stream` has carried since it was last looked at."""
        counted = (stream.bytes_up, stream.bytes_down)
        up, down = counted[0] - self._counted_bytes[0], counted[1] - self._counted_bytes[1]
        self._counted_bytes = counted
        self.stats.bytes_up += up
        self.stats.bytes_down += down
        if up:
            self.observer.bytes_up(up)
        if down:
            self.observer.bytes_down(down)

    def closed(self, stream: Stream) -> None:
        """`stream` ends; the next one counts from 0."""
        self.moved(stream)
        self._counted_bytes = (0, 0)

    def resuming(self) -> None:
        """The next Opened confirms that a lost session was taken up again."""
        self._resuming = True
