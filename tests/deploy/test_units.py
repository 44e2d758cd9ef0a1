"""The units on paper: systemd's own checks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).resolve().parents[2] / "deploy/systemd").glob("*.service"))
EXPOSURE_MAX = 2.0


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_exposes_little(unit: Path) -> None:
    said = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", unit], capture_output=True, text=True
    ).stdout
    [exposure] = re.findall(r"Overall exposure level for \S+: (\S+)", said)
    assert float(exposure) <= EXPOSURE_MAX, said


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_clean(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    [command] = re.findall(r"^ExecStart=(\S+)", text, re.MULTILINE)
    installed = tmp_path / unit.name  # where nothing is installed, an executable stands in
    installed.write_text(text.replace(f"ExecStart={command}", "ExecStart=/bin/true"))
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", installed], capture_output=True, text=True
    )
    assert (said.returncode, said.stderr.strip()) == (0, "")
