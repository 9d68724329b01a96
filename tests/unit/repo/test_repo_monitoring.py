"""Alerts and dashboard: they parse, and ask only for metrics and labels that the operator has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sandkeeper.control.metrics import Metrics, Snapshot

COMPONENTS = Path(__file__).resolve().parents[3] / "manifests" / "components"
RULES = yaml.safe_load((COMPONENTS / "prometheus-rule" / "prometheus-rule.yaml").read_text())
DASHBOARD = json.loads((COMPONENTS / "grafana-dashboard" / "sandkeeper.json").read_text())
ALERTS: list[dict[str, Any]] = [rule for group in RULES["spec"]["groups"] for rule in group["rules"]]
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]


class _Link:
    reachable = True

    def relist_age(self) -> float:
        return 1.0


class _Nodes:
    def links(self) -> Mapping[str, _Link]:
        return {"node-1": _Link()}


def exposed() -> dict[str, set[str]]:
    """The series that an operator has which has done everything once, and their labels."""
    metrics = Metrics()
    metrics.reconciled("success", 1)
    metrics.shim_call("node-1", "Start", "OK", 1)
    metrics.api_write("status")
    metrics.stage("ready", 1)
    metrics.depth(0, 0, 0)
    metrics.started(1)
    metrics.finished("done", 1)
    metrics.api_request("GET", "sandboxes", "200", 1)
    metrics.event("posted")
    metrics.watch_event("sandboxes", "ADDED")
    metrics.watch_missed()
    metrics.garbage("removed")
    metrics.certificate("ca", datetime.now(UTC))
    metrics.certificate_request("signed")
    metrics.registry.register(Snapshot({("node-1", "Running"): 1}, _Nodes()))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


SERIES = exposed()


def parsed(text: str) -> promql.Expr:
    return promql.parse(text.replace("$__rate_interval", "5m"))


def expressions() -> Iterator[tuple[str, str]]:
    for alert in ALERTS:
        yield alert["alert"], alert["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


@pytest.mark.parametrize(("where", "text"), list(expressions()))
def test_it_asks_for_what_there_is(where: str, text: str) -> None:
    parsed(text)
    used = set(re.findall(r"\bsandkeeper_\w+", text))
    assert used
    assert used <= SERIES.keys()
    labels = {"le"} | set().union(*(SERIES[name] for name in used))
    grouped = {
        name for names in re.findall(r"\b(?:by|on) ?\(([^)]*)\)", text) for name in re.findall(r"\w+", names)
    }
    matched = {
        name for inner in re.findall(r"\{([^}]*)\}", text) for name in re.findall(r"(\w+)\s*[=!]", inner)
    }
    assert grouped | matched <= labels


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    families = {re.sub(r"_(bucket|count|sum|total|created)$", "", name) for name in SERIES}
    shown = " ".join(text for _, text in expressions())
    # How often the watch spoke is for who debugs the operator.
    assert {name for name in families if name not in shown} == {"sandkeeper_watch_events"}


def test_every_alert_says_what_to_do() -> None:
    for alert in ALERTS:
        assert alert["for"]
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"].keys() == {"summary", "description"}
        kept = {"node", "verb", "resource", "method"}
        assert set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"])) <= kept


def test_every_panel_is_a_question_of_its_own() -> None:
    assert all("?" in panel["title"] for panel in PANELS)
    for key in ("id", "title"):
        assert len({panel[key] for panel in PANELS}) == len(PANELS)
    places = [tuple(panel["gridPos"].values()) for panel in PANELS]
    assert len(set(places)) == len(places)
