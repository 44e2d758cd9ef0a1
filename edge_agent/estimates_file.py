"""The file that carries an edge's estimates over a restart. Without it they are measured anew."""

import asyncio
import json
import logging
import os
from pathlib import Path

from edge_agent.estimates import Estimates

WRITE_INTERVAL_S = 60.0
BYTES_MAX = 1 << 20

logger = logging.getLogger(__name__)


class EstimatesFile:
    """Reads and writes `path`; does neither where that is empty. Never raises."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None

    def read(self) -> Estimates:
        """What is known; nothing where the file is missing or cannot be used."""
        if self._path is None:
            return Estimates()
        try:
            with self._path.open("rb") as file:
                return Estimates.from_json(json.loads(file.read(BYTES_MAX)))
        except FileNotFoundError:
            return Estimates()
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s is not used: %s", self._path, error)
            return Estimates()

    def write(self, estimates: Estimates) -> None:
        """Replace the file as a whole, so that no reader sees a part of it."""
        if self._path is None:
            return
        fresh = self._path.with_name(f"{self._path.name}.new")
        try:
            fresh.write_text(json.dumps(estimates.as_json()))
            os.replace(fresh, self._path)
        except OSError as error:
            logger.warning("the estimates were not kept: %s", error)

    async def keep(self, estimates: Estimates) -> None:
        """Write now and then, until cancelled."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            self.write(estimates)
