"""What the documentation says of files, names, states and settings is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cloud_server.config import ENV_PREFIX as CLOUD_PREFIX
from cloud_server.config import CloudConfig
from edge_agent.config import ENV_PREFIX as EDGE_PREFIX
from edge_agent.config import EdgeConfig
from picospec.config import Settings, load

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXTS = [*PAGES, ROOT / "proto/picospec/v1/speculation.proto"]
LINE_LENGTH_MAX = 120
FOLDERS = (
    *("picospec", "edge_agent", "cloud_server", "picospec_cli", "proto", "bench"),
    *("deploy", "tests", "docs", "examples"),
)
# A path in backquotes, and perhaps what is in it: `picospec/errors.py`, `edge_agent/link.py:Link`.
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*?)(?::(\w+))?`")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_short(page: Path) -> None:
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    long = [
        number
        for number, line in lines
        if len(line) > LINE_LENGTH_MAX and not line.startswith("|")  # a table's row is one line
    ]
    assert long == []


@pytest.mark.parametrize("text", TEXTS, ids=name)
def test_files_and_what_is_in_them_exist(text: Path) -> None:
    missing = []
    for path, symbol in PATH.findall(text.read_text(encoding="utf-8")):
        target = ROOT / path
        if not target.exists():
            missing.append(path)
        elif symbol and not re.search(rf"(def|class) {symbol}\b", target.read_text()):
            missing.append(f"{path}:{symbol}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_state_diagrams_are_those_of_the_tables() -> None:
    script = ROOT / "docs/state_diagrams.py"
    done = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, env={"PYTHONPATH": "."})
    assert done.returncode == 0, "run make diagrams and commit docs/protocol.md"


@pytest.mark.parametrize(
    ("file", "cls", "prefix"),
    [
        ("examples/edge.toml", EdgeConfig, EDGE_PREFIX),
        ("examples/cloud.toml", CloudConfig, CLOUD_PREFIX),
        ("deploy/kubernetes/base/cloud.toml", CloudConfig, CLOUD_PREFIX),
    ],
)
def test_example_settings_are_allowed(file: str, cls: type[Settings], prefix: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    load(cls, toml_text=text, environ={}, argv=(), env_prefix=prefix)
    switched_on = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)  # what may be uncommented
    load(cls, toml_text=switched_on, environ={}, argv=(), env_prefix=prefix)
