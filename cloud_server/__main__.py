"""`picospec-cloud`: read the configuration, then serve."""

import logging
import os
import sys
from collections.abc import Sequence

import uvloop

from cloud_server.config import ENV_PREFIX, CloudConfig, EngineConfig, completed
from cloud_server.engine.interface import VerificationEngine
from cloud_server.server import EXIT_ENGINE, serve
from picospec import logs
from picospec.config import read_arguments, redacted
from picospec.errors import ConfigError, PicoSpecError

EXIT_CONFIG = 2

logger = logging.getLogger("cloud_server")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 after a signal, 1 when the engine failed, 2 for a wrong configuration."""
    try:
        config = completed(
            read_arguments(
                CloudConfig,
                argv=sys.argv[1:] if argv is None else argv,
                environ=os.environ,
                env_prefix=ENV_PREFIX,
                program="picospec-cloud",
            ),
            os.environ,
        )
    except ConfigError as error:
        print(f"picospec-cloud: {error}", file=sys.stderr)
        return EXIT_CONFIG
    logs.configure(config.log.level, config.log.format)
    logger.info("configuration", extra=redacted(config))
    try:
        return uvloop.run(serve(config, _engine(config.engine)))
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_CONFIG
    except PicoSpecError as error:
        logger.error("the server could not start: %s", error)
        return EXIT_ENGINE


def _engine(config: EngineConfig) -> VerificationEngine:
    # Importing vLLM takes seconds: `--help` and a wrong configuration do not wait for it.
    from cloud_server.engine.client import VLLMEngine

    return VLLMEngine(config)


if __name__ == "__main__":
    sys.exit(main())
