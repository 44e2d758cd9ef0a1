"""The Kubernetes manifests, as kustomize builds them, against Kubernetes' own schemas."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cloud_server.config import ENV_PREFIX, CloudConfig
from picospec.config import load

KUBERNETES = Path(__file__).resolve().parents[2] / "deploy/kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
VERSION = "1.32"


def build(overlay: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES / "overlays" / overlay],
        check=True,
        capture_output=True,
        text=True,
    )
    return list(yaml.safe_load_all(done.stdout))


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == kind]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    objects = build(overlay)
    assert len(objects) == 7
    for each in objects:
        kubernetes_validate.validate(each, VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_selects_the_pods(overlay: str) -> None:
    objects = build(overlay)
    [pods] = of_kind(objects, "StatefulSet")
    labels = pods["spec"]["template"]["metadata"]["labels"].items()
    selectors = [pods["spec"]["selector"]["matchLabels"]]
    selectors += [each["spec"]["selector"] for each in of_kind(objects, "Service")]
    [budget] = of_kind(objects, "PodDisruptionBudget")
    [policy] = of_kind(objects, "NetworkPolicy")
    selectors += [
        budget["spec"]["selector"]["matchLabels"],
        policy["spec"]["podSelector"]["matchLabels"],
    ]
    assert len(selectors) == 5
    assert all(selector and selector.items() <= labels for selector in selectors)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_has_time_to_end(overlay: str) -> None:
    """The configuration is one that the server takes, and its grace fits into the pod's."""
    objects = build(overlay)
    [settings] = of_kind(objects, "ConfigMap")
    config = load(
        CloudConfig,
        toml_text=settings["data"]["cloud.toml"],
        environ={},
        argv=(),
        env_prefix=ENV_PREFIX,
    )
    [pods] = of_kind(objects, "StatefulSet")
    grace_s = pods["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert config.server.grace_s + 30 <= grace_s
    [container] = pods["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": config.server.port, "metrics": config.metrics.port}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert "resources" in container
