"""`picospec demo`, which is what `make run` does: an answer, a summary, and nothing left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.daemons import end_all

EAGER = "--cloud-flag=--engine.args.enforce_eager=true"  # compiling takes a minute, once
TIMEOUT_S = 300


@contextmanager
def demo(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "picospec_cli", "demo", EAGER, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A test run in the background has SIGINT ignored, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            end_all([*psutil.Process(process.pid).children(recursive=True), process])


def test_one_prompt_is_answered_and_summed_up(models: Path) -> None:
    arguments = ["--max-tokens", "24", "--temperature", "0"]
    with demo("--prompt", "What is the capital of France?", *arguments) as process:
        stdout, stderr = (out.decode() for out in process.communicate(timeout=TIMEOUT_S))
    assert process.returncode == 0, stderr
    assert "Paris" in stdout
    summary = next(line for line in stderr.splitlines() if line.startswith("["))
    for figure in (
        r"\d+ output tokens",
        r"first after [\d.]+ s",
        r"[\d.]+ tokens/s",
        r"acceptance rate [01]\.\d+ \(\d+/\d+\)",
        r"mean accepted length [\d.]+",
        r"[\d.]+ cloud forwards/token",
        r"\d+ bytes up and \d+ down per token",
        r"(split|coupled) mode",
    ):
        assert re.search(figure, summary), summary


def test_a_second_run_answers_too_and_ctrl_c_ends_all_of_it(models: Path) -> None:
    with demo("--prompt", "Tell me a long story.", "--mode", "coupled") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = os.read(process.stdout.fileno(), 1)
        assert first, process.stderr.read().decode()
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 4  # both daemons, engine and drafter
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 130, stderr.decode()
        assert not end_all(started)
