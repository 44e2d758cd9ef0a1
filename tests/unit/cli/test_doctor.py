"""`picospec doctor`: what it finds, and that it fails when something is wrong."""

from __future__ import annotations

from concurrent import futures
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from picospec_cli import doctor
from picospec_cli.__main__ import main
from picospec_cli.model_folder import build
from tests.support import fake_edge


def test_a_prepared_model(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    assert doctor.model(folder).ok is None

    def make(out: Path) -> None:
        (out / "weights").write_bytes(b"1234")

    build(folder, {"format": 1}, make)
    assert doctor.model(folder).ok is True
    (folder / "weights").write_bytes(b"1235")
    finding = doctor.model(folder)
    assert finding.ok is False
    assert "weights has another SHA-256" in finding.line()


def test_an_edge_agent() -> None:
    with fake_edge.running() as server:
        finding = doctor.edge(f"http://127.0.0.1:{server.server_port}")
        assert finding.line().endswith("serving fake")
    assert doctor.edge("http://127.0.0.1:9").ok is False


@pytest.mark.parametrize(
    ("status", "ok"),
    [
        (health_pb2.HealthCheckResponse.SERVING, True),
        (health_pb2.HealthCheckResponse.NOT_SERVING, False),
    ],
)
def test_a_cloud_server(status: int, ok: bool) -> None:
    servicer = health.HealthServicer()
    servicer.set("", status)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert doctor.cloud(f"127.0.0.1:{port}").ok is ok
    finally:
        server.stop(None)


def test_nobody_at_the_clouds_address() -> None:
    finding = doctor.cloud("127.0.0.1:9", timeout_s=1.0)
    assert finding.ok is False
    assert "does not answer" in finding.detail


def test_half_a_role_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1" if name == "tokenizers" else None)
    findings = list(doctor.packages())
    assert [finding.ok for finding in findings] == [None, None, None, False]


def test_packages_that_break_the_cpu_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.13.0+cpu")
    *_, last = doctor.packages()
    assert last.ok is False
    assert "pip uninstall torchvision" in last.detail


def test_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PICOSPEC_HOME", str(tmp_path))
    assert main(["doctor", "--offline"]) == 0
    assert "all is well" in capsys.readouterr().out
    assert main(["doctor", "--edge", "http://127.0.0.1:9", "--cloud", "127.0.0.1:9"]) == 1
    assert "FAIL edge agent" in capsys.readouterr().out
