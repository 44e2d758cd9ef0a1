"""What the commands say on stderr while they work; stdout belongs to their result."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from picospec.errors import PicoSpecError


class CommandFailed(PicoSpecError):
    """A command could not do what was asked; the message is all that the user is shown."""


def is_interactive() -> bool:
    """Whether somebody can type at us. A service may have no stdin at all."""
    return sys.stdin is not None and sys.stdin.isatty()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Names a step that takes a while, and how long it took when it is done."""
    say(f"{what} ...")
    started_s = time.monotonic()
    yield
    say(f"{what}: done in {time.monotonic() - started_s:.0f} s")


def tail(text: str, num_lines: int = 20) -> str:
    """The last lines of a log, indented to stand below a message."""
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-num_lines:])
