"""Log records: one per line, with the request id bound where they were made."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from picospec import logs


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.usefixtures("restored_logging")
async def test_json_records_carry_the_request_id_of_their_task() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    logger = logging.getLogger("picospec.test")

    async def generation(name: str) -> None:
        logs.request_id.set(name)
        await asyncio.sleep(0)
        logger.info("opened %s", name, extra={"tokens": 0})

    await asyncio.gather(generation("a"), generation("b"))
    logger.debug("not shown")
    logger.warning("outside")
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(r["message"], r.get("request_id"), r.get("tokens")) for r in records] == [
        ("opened a", "a", 0),
        ("opened b", "b", 0),
        ("outside", None, None),
    ]
    assert records[2]["level"] == "warning"
    assert records[2]["logger"] == "picospec.test"


@pytest.mark.usefixtures("restored_logging")
def test_an_exception_stays_on_the_json_line() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("picospec.test").exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: broken" in json.loads(line)["exception"]


@pytest.mark.usefixtures("restored_logging")
def test_text_records_cannot_be_forged_by_their_content() -> None:
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    logging.getLogger("t").info("hello\nERROR %s", "\x1b[31m", extra={"n": 3, "name_of": "a\nb"})
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("t: hello\\nERROR \\x1b[31m n=3 name_of=a\\nb")


@pytest.mark.usefixtures("restored_logging")
def test_what_a_library_adds_to_every_record_is_no_field() -> None:
    class Record(logging.LogRecord):
        def __init__(self, *values: Any, **named: Any) -> None:
            super().__init__(*values, **named)
            self.library_name = "x"

    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(Record)
    try:
        stream = io.StringIO()
        logs.configure("info", "text", stream)
        logging.getLogger("t").info("hello", extra={"n": 1})
        assert stream.getvalue().endswith("t: hello n=1\n")
    finally:
        logging.setLogRecordFactory(before)
