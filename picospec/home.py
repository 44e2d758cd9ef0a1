"""Where PicoSpec keeps files of its own: prepared models, and what an edge has learnt."""

import os
from collections.abc import Mapping
from pathlib import Path


def home(environ: Mapping[str, str] = os.environ) -> Path:
    """`$PICOSPEC_HOME`, by default `~/.cache/picospec`. Raises RuntimeError if there is no `~`."""
    given = environ.get("PICOSPEC_HOME")
    return Path(given) if given else Path.home() / ".cache" / "picospec"
