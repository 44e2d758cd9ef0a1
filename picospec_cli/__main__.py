"""The `picospec` command line."""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from picospec.errors import PicoSpecError

# Each is a module here with add_arguments(parser) and run(arguments) -> exit status.
COMMANDS = {
    "prepare": "make the default models, or a draft from a Hugging Face model",
    "demo": "start both daemons on this machine and answer a prompt",
    "chat": "chat with a running edge agent",
    "doctor": "examine the installation, the models and the daemons",
    "predict": "predict the throughput over round trip, acceptance and draft length",
}

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="picospec")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name in words[:1]:  # only the command that runs is imported
            importlib.import_module(f"picospec_cli.{name}").add_arguments(subparser)
    arguments = parser.parse_args(words)
    previous = {number: signal.signal(number, _leave) for number in _SIGNALS}
    try:
        status: int = importlib.import_module(f"picospec_cli.{arguments.command}").run(arguments)
        return status
    except KeyboardInterrupt:
        return 130
    except (PicoSpecError, OSError) as error:
        print(f"picospec: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(signum: int, frame: FrameType | None) -> None:
    """A command asked to end unwinds, so that what it started is stopped and cleaned up."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    raise SystemExit(main())
