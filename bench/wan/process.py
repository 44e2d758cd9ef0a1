"""The emulated WAN as a process of its own (`python -m bench.wan`), and how to command it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass
from typing import Any

from bench.machine import edge_core, pinned
from picospec_cli.processes import die_with_parent

STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Counts:
    """Bytes of TCP payload that were put on the line, HTTP/2 framing included."""

    up: int
    down: int

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(self.up - earlier.up, self.down - earlier.down)


NO_BYTES = Counts(0, 0)


class WanProcess:
    """A relay to one server of loopback, on the edge's core. It ends with our end of its input."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port

    @classmethod
    async def start(cls, target_port: int) -> WanProcess:
        """A link without delay or limit, until `set` says otherwise."""
        with pinned(edge_core()):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bench.wan", "--rtt-ms", "0"),
                *("--target", f"127.0.0.1:{target_port}"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is for us to handle
                preexec_fn=die_with_parent,
            )
        self = cls(process, 0)
        self.port = (await self._answer())["port"]
        return self

    async def set(self, rtt_ms: float, kbit_s: float | None) -> None:
        """The link from now on."""
        await self._command({"rtt_ms": rtt_ms, "kbit_s": kbit_s})
        await self.counts()  # has an answer, so the command before it is carried out

    async def counts(self) -> Counts:
        await self._command({"counts": True})
        answer = await self._answer()
        return Counts(answer["bytes_up"], answer["bytes_down"])

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _command(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()

    async def _answer(self) -> dict[str, Any]:
        """Raises RuntimeError if the relay refuses or is gone."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the relay has ended"}
        if "error" in answer:
            raise RuntimeError(f"relay: {answer['error']}")
        return answer
