"""Alert rules and dashboard, against what the daemons really export."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cloud_server.config import MetricsConfig
from cloud_server.engine.interface import EngineStats
from cloud_server.engine.scripted import SCRIPTED_CARD
from cloud_server.metrics import CloudMetrics, MetricsServer
from edge_agent.metrics import EdgeMetrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus/rules/picospec.yml"
DASHBOARD = DEPLOY / "grafana/dashboards/picospec.json"
PROMETHEUS_OWN = {"up"}


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """The name of every sample that the daemons may export."""
    cloud = CloudMetrics(SCRIPTED_CARD)
    cloud.engine(EngineStats(), healthy=True)
    server = MetricsServer(MetricsConfig(port=0), cloud)
    try:
        text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    finally:
        server.close()
    text += EdgeMetrics().exposition().decode()
    # A metric with labels has no sample before it is first used; its type is there.
    return {
        name
        for family in text_string_to_metric_families(text)
        for name in sample_names(family.name, family.type)
    }


def sample_names(name: str, kind: str) -> set[str]:
    if kind == "histogram":
        return {f"{name}_{part}" for part in ("bucket", "sum", "count")}
    return {f"{name}_total"} if kind == "counter" else {name}


def rules() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def panels() -> Iterator[tuple[str, str]]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


QUERIES = [*rules(), *panels()]


def metric_names(expr: str) -> set[str]:
    """The metrics that a PromQL expression reads.

    >>> sorted(metric_names('sum by (le) (rate(a_total{b="c d_total"}[5m])) / x:y_total > 0.5'))
    ['a_total', 'x:y_total']
    """
    bare = re.sub(r'"[^"]*"', '""', expr)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)", " ", bare)
    words = re.findall(r"[A-Za-z_][\w:]*", bare)
    return {word for word in words if "_" in word or word in PROMETHEUS_OWN} - {
        "histogram_quantile",
        "min_over_time",
    }


@pytest.mark.parametrize(("what", "expr"), QUERIES, ids=[what for what, _ in QUERIES])
def test_what_is_queried_is_exported(what: str, expr: str, exported: set[str]) -> None:
    names = metric_names(expr)
    assert names, expr
    assert names <= exported | PROMETHEUS_OWN


def test_the_rules_fire_when_they_should() -> None:
    promtool("check", "config", DEPLOY / "prometheus/prometheus.yml")
    promtool("test", "rules", DEPLOY / "prometheus/tests/picospec_test.yml")


def test_the_dashboards_queries_are_promql(tmp_path: Path) -> None:
    known = {"$__rate_interval": "5m", "$edge": ".*", "$cloud": ".*"}
    records = []
    for number, (_, expr) in enumerate(panels()):
        for variable, value in known.items():
            expr = expr.replace(variable, value)
        assert "$" not in expr
        records.append({"record": f"panel_{number}", "expr": expr})
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    promtool("check", "rules", path)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
