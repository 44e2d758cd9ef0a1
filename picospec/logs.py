"""Structured logs: one record per line, each with the id of the generation it belongs to.

Not structlog: it would take fields of a library's own record factory for ours, and its renderer
lets a caller's control characters forge a line. Without these two parts nothing would be left.
"""

import json
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, TextIO

# Set where a generation starts; tasks created from there inherit it. Empty outside of one.
request_id: ContextVar[str] = ContextVar("request_id", default="")

LEVELS = ("debug", "info", "warning", "error")

_SHOWN_APART = frozenset({"message", "asctime", "request_id"})


def configure(
    level: str, format: Literal["json", "text"] = "text", stream: TextIO | None = None
) -> None:
    """Send every record from `level` up to `stream` (default: stderr), replacing what was set.

    `logger.info("...", extra={...})` adds fields.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, request_id and the extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if bound := _request_id(record):
            entry["request_id"] = bound
        entry |= _extra(record)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For people: time, level, logger, message, then the fields as key=value.

    Control characters of the message are escaped, so that no caller can forge a line.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = _one_line(record.getMessage())
        fields = {"request_id": _request_id(record)} | _extra(record)
        tail = "".join(
            f" {key}={_one_line(str(value))}" for key, value in fields.items() if value != ""
        )
        line = f"{_time(record)} {record.levelname:<7} {record.name}: {message}{tail}"
        return line + "\n" + self.formatException(record.exc_info) if record.exc_info else line


def _request_id(record: logging.LogRecord) -> str:
    return str(getattr(record, "request_id", "") or request_id.get())


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    standard = _standard_fields(logging.getLogRecordFactory())
    return {key: value for key, value in vars(record).items() if key not in standard}


@lru_cache(maxsize=4)
def _standard_fields(factory: Callable[..., logging.LogRecord]) -> frozenset[str]:
    """What every record has, fields of a library's own record factory included."""
    return frozenset(vars(factory("", 0, "", 0, "", (), None))) | _SHOWN_APART


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _one_line(text: str) -> str:
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
