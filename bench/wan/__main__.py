"""The relay as a process of its own: `python -m bench.wan --target HOST:PORT --rtt-ms 50`.

Prints {"port": N}, then takes commands, one JSON object per line, and ends when its input does:

    {"rtt_ms": 100, "jitter_ms": 5, "kbit_s": 50}   any of them; "kbit_s": null is unlimited
    {"cut": 1.0}                                    refuse connections for so many seconds
    {"black_hole": true}                            or false, which also ends a refusal
    {"counts": true}                                prints {"bytes_up": ..., "bytes_down": ...}

A command that is not understood changes nothing and prints {"error": "..."}.
"""

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.wan.line import LineConditions
from bench.wan.relay import WanRelay

NUMBER = (int, float)
KINDS: Mapping[str, tuple[type, ...]] = {
    "rtt_ms": NUMBER,
    "jitter_ms": NUMBER,
    "kbit_s": (*NUMBER, type(None)),
    "cut": NUMBER,
    "black_hole": (bool,),
    "counts": (bool,),
}


@dataclass(frozen=True, slots=True)
class Conditions:
    """The same both ways: `rtt_ms` without jitter, of which each way has up to `jitter_ms`."""

    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    kbit_s: float | None = None

    def link(self) -> LineConditions:
        """Raises ValueError."""
        bandwidth_bps = None if self.kbit_s is None else self.kbit_s * 1e3
        return LineConditions.symmetric(self.rtt_ms / 1e3, self.jitter_ms / 1e3, bandwidth_bps)


def _parse(line: str) -> dict[str, Any]:
    """Raises ValueError."""
    command = json.loads(line)
    if not isinstance(command, dict) or not command:
        raise ValueError("a command is a JSON object with at least one key")
    for key, value in command.items():
        if key not in KINDS:
            raise ValueError(f"unknown command {key!r}; there are {', '.join(KINDS)}")
        is_bool = isinstance(value, bool)
        if not isinstance(value, KINDS[key]) or is_bool != (KINDS[key] == (bool,)):
            raise ValueError(f"{key} cannot be {value!r}")
    if not command.get("cut", 0) >= 0:
        raise ValueError(f"cut must be at least 0, not {command['cut']}")
    return command


def _obey(relay: WanRelay, conditions: Conditions, command: dict[str, Any]) -> Conditions:
    """The conditions after it. Raises ValueError before anything has changed."""
    changes = {key: command[key] for key in ("rtt_ms", "jitter_ms", "kbit_s") if key in command}
    if changes:
        conditions = replace(conditions, **changes)
        link = conditions.link()
        relay.set(up=link, down=link)
    if "cut" in command:
        relay.cut(command["cut"])
    if "black_hole" in command:
        (relay.black_hole if command["black_hole"] else relay.restore)()
    if command.get("counts"):
        _say({"bytes_up": relay.bytes_up, "bytes_down": relay.bytes_down})
    return conditions


def _say(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _read_lines(lines: asyncio.Queue[bytes], loop: asyncio.AbstractEventLoop) -> None:
    """From stdin, unbuffered so that no lock is held when the process ends; b"" at its end."""
    with open(0, "rb", buffering=0, closefd=False) as source:
        while True:
            line = source.readline()
            loop.call_soon_threadsafe(lines.put_nowait, line)
            if not line:
                return


async def _run(target: tuple[str, int], conditions: Conditions, port: int, seed: int) -> None:
    lines: asyncio.Queue[bytes] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    link = conditions.link()
    async with WanRelay(*target, link, link, seed, listen_port=port) as relay:
        _say({"port": relay.port})
        threading.Thread(target=_read_lines, args=(lines, loop), daemon=True).start()
        while line := await lines.get():
            try:
                conditions = _obey(relay, conditions, _parse(line.decode()))
            except ValueError as error:  # also what JSON and UTF-8 raise
                _say({"error": str(error)})


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench.wan", description=summary)
    parser.add_argument("--target", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt-ms", type=float, required=True, help="round trip without jitter")
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="at most, added each way")
    parser.add_argument("--kbit-s", type=float, help="each way; unlimited without it")
    parser.add_argument("--port", type=int, default=0, help="listen here; default: any free port")
    parser.add_argument("--seed", type=int, default=0, help="of the jitter")
    arguments = parser.parse_args()
    conditions = Conditions(arguments.rtt_ms, arguments.jitter_ms, arguments.kbit_s)
    try:
        conditions.link()
        asyncio.run(_run(arguments.target, conditions, arguments.port, arguments.seed))
    except (ValueError, OSError, OverflowError) as error:  # a bad or a taken port
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
