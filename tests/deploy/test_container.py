"""The cloud server's image: built, run as a non-root user on a read-only root, and asked.

The tests run in order: the last one ends the container.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose

from tests.deploy.conftest import CONTAINER_TAG as TAG
from tests.support.chat_over_http import EdgeClient
from tests.support.container import Container, Images
from tests.support.daemons import API_KEY, CLOUD_TOKEN, Daemons, until
from tests.support.machine import free_port

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "deploy/container"
LOAD_TIMEOUT_S = 480.0  # with the default settings vLLM compiles the model
STOP_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def container(
    images: Images, models: Path, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    environ = {
        "PICOSPEC_CLOUD_SERVER_PORT": str(port),
        "PICOSPEC_CLOUD_SERVER_AUTH_TOKEN": CLOUD_TOKEN,
        "PICOSPEC_CLOUD_METRICS_PORT": str(free_port()),
    }
    log = tmp_path_factory.mktemp("container") / "log"
    with images.running(TAG, models, environ, log) as container:
        probe = ("python3", "-m", "cloud_server.probe", f"127.0.0.1:{port}")
        assert container.run(*probe).returncode == 1  # it loads

        def serves() -> bool:
            assert container.running, log.read_text()[-4000:]
            return container.run(*probe).returncode == 0

        until(serves, LOAD_TIMEOUT_S)
        yield container


@pytest.fixture(scope="module")
def edge(container: Container, port: int, daemons: Daemons, models: Path) -> EdgeClient:
    """A real edge agent outside."""
    outside = daemons.start_edge_at(
        "edge-of-the-container", port, "target", "--drafter.model", str(models / "draft-int4")
    )
    until(outside.is_healthy)
    return EdgeClient(outside.url, API_KEY)


def test_the_image_says_how_it_is_run(images: Images) -> None:
    config = images.config(TAG)
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["picospec-cloud"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "python3", "-m", "cloud_server.probe"]


def test_it_answers_a_real_edge(edge: EdgeClient) -> None:
    assert edge.ask() == edge.ask() != ""


def test_with_the_default_settings_the_model_is_compiled(container: Container) -> None:
    """Which takes the image's compiler; /tmp, where nothing may be executed, is no place for it."""
    found = container.run("find", "/cache/torchinductor", "/cache/vllm", "-name", "*.so")
    assert found.stdout, found.stderr


def test_it_runs_as_a_user_without_rights_on_a_read_only_root(container: Container) -> None:
    status = Path(f"/proc/{container.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert set(fields["Uid"].split()) == {"65532"}
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NSpid"].split()[-1] == "1"
    for folder in ("/", "/opt/picospec", "/etc", "/models"):
        refused = container.run("sh", "-c", f"touch {folder}/file")
        assert refused.returncode != 0
        assert "Read-only file system" in refused.stderr
    assert container.run("sh", "-c", "touch /tmp/file /cache/file").returncode == 0


def test_sigterm_lets_a_running_answer_finish(edge: EdgeClient, container: Container) -> None:
    chunks = edge.stream(max_tokens=96)
    next(chunks)
    os.kill(container.pid, signal.SIGTERM)
    rest = list(chunks)
    assert rest[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert len(rest) > 4
    assert container.wait(STOP_TIMEOUT_S) == 0


def test_the_compose_file_is_valid() -> None:
    text = (CONTAINER / "compose.yaml").read_text()
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)  # what compose puts in for itself
    text = re.sub(r"\$\{\w+:\?[^}]*\}", "a-secret", text)
    merged = yaml.safe_dump(yaml.safe_load(text))  # YAML's own merge keys
    services = PyCompose.from_yaml(merged).to_spec().services
    assert services is not None
    assert set(services) == {"cloud", "prometheus", "grafana"}
