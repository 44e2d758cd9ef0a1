"""`picospec-edge`: the edge agent as a command."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence

import uvloop

from edge_agent import config as edge_config
from edge_agent.config import EdgeConfig
from edge_agent.server import EdgeServer
from picospec import logs
from picospec.config import redacted
from picospec.errors import PicoSpecError

logger = logging.getLogger("edge_agent")


def main(argv: Sequence[str] | None = None) -> int:
    """0 after an ordered end, 2 for a wrong configuration, 1 when a part cannot start."""
    try:
        config = edge_config.read(sys.argv[1:] if argv is None else argv, os.environ)
    except PicoSpecError as error:
        print(f"{edge_config.PROGRAM}: {error}", file=sys.stderr)
        return 2
    logs.configure(config.log.level, config.log.format)
    logger.info("configuration %s", json.dumps(redacted(config), default=str))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(config))
    except PicoSpecError as error:
        logger.error("cannot start: %s", error)
        return 1
    return 0


async def _run(config: EdgeConfig) -> None:
    await EdgeServer(config).run()


if __name__ == "__main__":
    sys.exit(main())
