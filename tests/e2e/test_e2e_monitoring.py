"""What Prometheus would make of us: our rules by its own reader, ServiceMonitor and PrometheusRule by its operator's
CRDs, and what our operator's Service serves."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.cluster import eventually
from tests.e2e.install import ROOT, SYSTEM, Installation
from tests.sandboxes import Sandboxes

from sandkeeper.localcluster import binaries, gobuild
from sandkeeper.localcluster.apiserver import Kubectl, apply_crds

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

Object = dict[str, Any]
COMPONENTS = ROOT / "manifests" / "components"
RULES: Object = yaml.safe_load((COMPONENTS / "prometheus-rule" / "prometheus-rule.yaml").read_text())["spec"]
PANELS: list[Object] = json.loads((COMPONENTS / "grafana-dashboard" / "sandkeeper.json").read_text())[
    "panels"
]
METRICS = f"/api/v1/namespaces/{SYSTEM}/services/sandkeeper-operator:http/proxy/metrics"


@pytest.fixture(scope="module")
def read() -> Callable[[Path, Object], subprocess.CompletedProcess[str]]:
    """Writes rules to a file and has Prometheus's own code read it. The first time that is built."""
    program = binaries.built(
        "prometheus-rules", gobuild.PROMETHEUS, say=lambda line: print(line, file=sys.stderr)
    )

    def run(path: Path, rules: Object) -> subprocess.CompletedProcess[str]:
        path.write_text(yaml.safe_dump(rules))
        return subprocess.run([program, path], capture_output=True, text=True, check=False, timeout=60)

    return run


Read = Callable[[Path, Object], subprocess.CompletedProcess[str]]


def test_prometheus_takes_our_alerts(read: Read, tmp_path: Path) -> None:
    done = read(tmp_path / "rules.yaml", RULES)
    assert (done.returncode, done.stderr) == (0, "")


def test_prometheus_takes_what_the_dashboard_asks(read: Read, tmp_path: Path) -> None:
    asked = [target["expr"] for panel in PANELS for target in panel["targets"]]
    rules = [
        {"record": f"asked:{index}", "expr": expr.replace("$__rate_interval", "5m")}
        for index, expr in enumerate(asked)
    ]
    done = read(tmp_path / "rules.yaml", {"groups": [{"name": "dashboard", "rules": rules}]})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "change",
    [
        {"expr": "sum(sandkeeper_queue_keys"},
        {"expr": "rate(sandkeeper_queue_keys)"},
        {"for": "soon"},
        {"annotations": {"summary": "{{ $labels.node"}},
        {"severity": "critical"},
    ],
    ids=["unfinished", "rate of no range", "no duration", "no template", "no such field"],
)
def test_prometheus_refuses_what_is_wrong(read: Read, tmp_path: Path, change: Object) -> None:
    rules = copy.deepcopy(RULES)
    rules["groups"][0]["rules"][0] |= change
    done = read(tmp_path / "rules.yaml", rules)
    assert done.returncode == 1
    assert done.stderr


@pytest.fixture
def monitored(installation: Installation) -> Iterator[Kubectl]:
    """kubectl, where the Prometheus operator's kinds are known."""
    module = "github.com/prometheus-operator/prometheus-operator"
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    source = gobuild.source(module, binaries.cache_root(), say, gobuild.PROMETHEUS_OPERATOR)
    assert source is not None
    folder = source / "example" / "prometheus-operator-crd"
    names = [f"monitoring.coreos.com_{kind}.yaml" for kind in ("servicemonitors", "prometheusrules")]
    crds = "---\n".join((folder / name).read_text() for name in names)
    apply_crds(installation.kubectl, crds)
    yield installation.kubectl
    installation.kubectl("delete", "-f", "-", input=crds)


def test_the_prometheus_operators_kinds_take_ours(monitored: Kubectl) -> None:
    flags = ("apply", "--server-side", "--validate=strict", "-f", "-")
    for component in ("service-monitor", "prometheus-rule"):
        text = (COMPONENTS / component / f"{component}.yaml").read_text()
        monitored(*flags, input=text)
        wrong = yaml.safe_load(text)
        wrong["spec"]["no-such-field"] = []
        assert monitored.run(*flags, "--dry-run=server", input=json.dumps(wrong)).returncode != 0


def test_the_service_serves_what_alerts_and_dashboard_ask_for(
    installation: Installation, sandboxes: Sandboxes
) -> None:
    name = sandboxes.make("seen")
    sandboxes.until_ready(name)
    sandboxes.delete(name)
    sandboxes.until_gone(name)

    def served() -> dict[str, Any]:
        text = installation.kubectl("get", "--raw", METRICS)
        return {family.name: family for family in text_string_to_metric_families(text)}

    eventually(lambda: "sandkeeper_node_reachable" in served(), timeout=60)
    found = served()
    reachable = found["sandkeeper_node_reachable"].samples
    assert [(each.labels["node"], each.value) for each in reachable] == [("node-1", 1.0)]
    exprs = [rule["expr"] for rule in RULES["groups"][0]["rules"]]
    exprs += [target["expr"] for panel in PANELS for target in panel["targets"]]
    asked = set(re.findall(r"\bsandkeeper_\w+", " ".join(exprs)))
    families = {re.sub(r"_(bucket|count|sum|total)$", "", each) for each in asked}
    assert families <= found.keys()
