"""The file that carries an edge's estimates over a restart. Without it they are measured anew.

Estimates belong to a drafter and the model that the cloud serves. The file has an entry for each
such pair, so that agents with one home do not use or overwrite what another one has learnt. It is
replaced as a whole: a reader sees the old or the new one. Two agents that write at the same moment
may lose the entry of one, which writes it again a minute later.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from edge_agent.drafting.messages import DrafterSpec
from edge_agent.estimates import Estimates
from picospec.home import home
from picospec.protocol.messages import ModelCard

AUTO, OFF = "auto", "off"  # what the setting may be, beside a path
NAME = "estimates.json"
VERSION = 2
PAIRS_MAX = 16  # in one file; the one not written for longest goes first
WRITE_INTERVAL_S = 60.0
BYTES_MAX = 1 << 20

logger = logging.getLogger(__name__)


def place(setting: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where `speculation.estimates_file` says; None: nowhere."""
    if setting == OFF:
        return None
    if setting != AUTO:
        return Path(setting)
    if given := environ.get("STATE_DIRECTORY"):  # by systemd; several are separated by colons
        return Path(given.split(":")[0]) / NAME
    try:
        return home(environ) / NAME
    except RuntimeError as error:
        logger.warning("estimates are not kept: %s; name a place in PICOSPEC_HOME", error)
        return None


def drafter_identity(spec: DrafterSpec) -> str:
    """Another one for another draft model, wherever its folder is: names, sizes and times of its
    files. Reading the weights would take a small box seconds."""
    files = []
    if spec.model:
        with contextlib.suppress(OSError):  # for the drafter to report
            for path in sorted(Path(spec.model).iterdir()):
                state = path.stat()
                files.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join([spec.backend, *files]).encode()).hexdigest()


def cloud_identity(card: ModelCard) -> str:
    named = [card.model_id, card.logits_width, card.tokenizer_fingerprint]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


class EstimatesFile:
    """Keeps `estimates` at `path`, or nowhere. Never raises: what fails is told once."""

    def __init__(self, path: Path | None, estimates: Estimates, drafter: str) -> None:
        """`drafter`: its identity."""
        self._path = path
        self._estimates = estimates
        self._drafter = drafter
        self._cloud = ""  # the identity of its model, once it is known
        self._told = False

    def served(self, card: ModelCard) -> None:
        """The cloud serves this model: `estimates` become those made with it."""
        cloud = cloud_identity(card)
        if self._path is None or cloud == self._cloud:
            return
        self.write()
        self._cloud = cloud
        known = self._known() or Estimates()
        for field in fields(Estimates):
            setattr(self._estimates, field.name, getattr(known, field.name))

    def write(self) -> None:
        """To be called now and then, and at the end."""
        if self._path is None or not self._cloud:
            return
        entry = {"drafter": self._drafter, "cloud": self._cloud, **self._estimates.as_json()}
        others = [each for each in self._entries() if not self._is_ours(each)]
        document = {"version": VERSION, "pairs": [*others[-(PAIRS_MAX - 1) :], entry]}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._path, json.dumps(document))
            self._told = False
        except OSError as error:
            self._tell("estimates are not kept: %s", error)

    async def keep(self) -> None:
        """Write now and then, until cancelled."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            self.write()

    def _known(self) -> Estimates | None:
        for entry in filter(self._is_ours, self._entries()):
            try:
                return Estimates.from_json(entry)
            except ValueError as error:
                self._tell(f"{self._path} is not used: %s", error)
        return None

    def _is_ours(self, entry: dict[str, Any]) -> bool:
        return (entry.get("drafter"), entry.get("cloud")) == (self._drafter, self._cloud)

    def _entries(self) -> list[dict[str, Any]]:
        """Of all pairs; none where the file is missing or cannot be used."""
        assert self._path is not None
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(BYTES_MAX))
            if document["version"] != VERSION:
                return []  # of another release
            return [entry for entry in document["pairs"] if isinstance(entry, dict)]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            self._tell(f"{self._path} is not used: %s", error)
            return []

    def _tell(self, message: str, error: Exception) -> None:
        if not self._told:
            logger.warning(message, error)
        self._told = True


def _replace(path: Path, text: str) -> None:
    """Raises OSError, and leaves nothing behind."""
    descriptor, fresh = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
