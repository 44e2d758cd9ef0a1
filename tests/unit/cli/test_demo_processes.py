"""The demo starts two daemons, answers, and leaves no process behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from picospec_cli.pairs import DEFAULT
from tests.support.fake_edge import PIECES

ROOT = Path(__file__).resolve().parents[3]

# Like vLLM, this daemon has a process of its own below it.
CLOUD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
with open("pids", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
print("cloud is up", flush=True)
time.sleep(300)
"""
EDGE = "import runpy\nrunpy.run_module('tests.support.fake_edge', run_name='__main__')\n"
DYING = "print('out of memory, say'); raise SystemExit(3)\n"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `python -m cloud_server` and `-m edge_agent` start doubles."""
    (tmp_path / "cloud_server.py").write_text(CLOUD)
    (tmp_path / "edge_agent.py").write_text(EDGE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def demo(stage: Path, *flags: str) -> subprocess.Popen[str]:
    code = (
        "from picospec_cli import prepare\n"
        "prepare.prepare_pair = lambda pair, names: None\n"
        "from picospec_cli.__main__ import main\n"
        "raise SystemExit(main())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "demo", *flags],
        cwd=stage,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: object, timeout_s: float = 30.0) -> None:
    assert callable(condition)
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


def assert_gone(stage: Path) -> None:
    """The daemon's own child was killed, not waited for: the kernel may take a moment."""
    wait_for(lambda: not any(map(is_running, cloud_pids(stage))), timeout_s=5.0)


def cloud_pids(stage: Path) -> list[int]:
    text = (stage / "pids").read_text() if (stage / "pids").exists() else ""
    return [int(word) for word in text.split()]


def logs(stage: Path) -> list[Path]:
    return list(stage.glob("picospec-demo-*"))


def test_one_answer_and_nothing_is_left(stage: Path) -> None:
    process = demo(stage, "--prompt", "why")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "".join(PIECES) + "\n"
    assert "8 output tokens" in err
    assert "coupled mode" in err
    assert_gone(stage)
    assert logs(stage) == []


def test_a_default_prompt_without_a_terminal(stage: Path) -> None:
    process = demo(stage)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "".join(PIECES) + "\n"


@pytest.mark.parametrize("module", ["cloud_server", "edge_agent"])
def test_a_daemon_that_dies_is_quoted(stage: Path, module: str) -> None:
    (stage / f"{module}.py").write_text(DYING)
    process = demo(stage, "--prompt", "why")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{module} ended with status 3" in err
    assert "out of memory, say" in err
    assert out == ""
    assert_gone(stage)


def test_waiting_is_bounded(stage: Path) -> None:
    (stage / "edge_agent.py").write_text("import time; time.sleep(300)")
    process = demo(stage, "--prompt", "why", "--start-timeout-s", "0.5")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "not ready after 0 s: the edge agent does not listen yet" in err
    assert_gone(stage)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything(stage: Path, number: signal.Signals) -> None:
    (stage / "edge_agent.py").write_text("import time; time.sleep(300)")
    process = demo(stage, "--prompt", "why")
    wait_for(lambda: len(cloud_pids(stage)) == 2)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert_gone(stage)
    assert logs(stage) == []


def test_the_daemons_end_with_a_killed_demo(stage: Path) -> None:
    process = demo(stage, "--prompt", "why", "--edge-flag=--x", "--edge-flag=y")
    wait_for(lambda: len(cloud_pids(stage)) == 2)
    process.kill()
    process.communicate(timeout=60)
    daemon, grandchild = cloud_pids(stage)
    wait_for(lambda: not is_running(daemon))
    os.kill(grandchild, signal.SIGKILL)  # a daemon's own children are that daemon's business


def test_prepared_models_are_what_the_daemons_get() -> None:
    from picospec_cli.demo import Plan

    plan = Plan(
        Path("/m/target"), Path("/m/draft"), mode="split", edge_port=1, cloud_port=2, metrics_port=3
    )
    assert "/m/target" in plan.cloud_arguments()
    assert "/m/draft" in plan.edge_arguments()
    assert "127.0.0.1:2" in plan.edge_arguments()
    assert set(DEFAULT.drafts) == {"draft-int4", "draft-int8"}
