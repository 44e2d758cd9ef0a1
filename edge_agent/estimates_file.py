"""The file that carries an edge's estimates over a restart. Without it they are measured anew.

Several edges may have the same home: the one that writes last is read by the next one, if that has
the same drafter and the same cloud.
"""

import asyncio
import json
import logging
import os
from pathlib import Path

from edge_agent.estimates import Estimates
from picospec.home import home

AUTO, NAME = "auto", "estimates.json"
WRITE_INTERVAL_S = 60.0
BYTES_MAX = 1 << 20

logger = logging.getLogger(__name__)


class EstimatesFile:
    """Reads and writes `path`; does neither where that is empty. Never raises.

    `made_with` names drafter and cloud: what was measured with others is not used.
    """

    def __init__(self, path: str, made_with: str = "") -> None:
        self._path = Path(path) if path else None
        self._made_with = made_with
        self._failed = False
        if path == AUTO:
            try:
                self._path = home() / NAME
            except RuntimeError as error:
                self._path = None
                logger.warning("estimates are not kept: %s; name a place in PICOSPEC_HOME", error)

    def read(self) -> Estimates:
        """What is known; nothing where the file is missing or cannot be used."""
        if self._path is None:
            return Estimates()
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(BYTES_MAX))
            if isinstance(document, dict) and document.get("made_with") != self._made_with:
                return Estimates()
            return Estimates.from_json(document)
        except FileNotFoundError:
            return Estimates()
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s is not used: %s", self._path, error)
            return Estimates()

    def write(self, estimates: Estimates) -> None:
        """Replace the file as a whole, so that no reader sees a part of it."""
        if self._path is None:
            return
        document = {**estimates.as_json(), "made_with": self._made_with}
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(document))
            os.replace(fresh, self._path)
            self._failed = False
        except OSError as error:
            if not self._failed:  # told once
                logger.warning("estimates are not kept: %s", error)
            self._failed = True

    async def keep(self, estimates: Estimates) -> None:
        """Write now and then, until cancelled."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            self.write(estimates)
