"""What the bench makes of what it has measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bench import bars, plot
from bench.__main__ import PARTS, merge
from bench.costs import of_sandboxes, parse_writes
from bench.result import Result, milliseconds, percentile

METRICS = """\
# TYPE apiserver_request_total counter
apiserver_request_total{code="201",group="sandkeeper.dev",resource="sandboxes",subresource="",verb="POST"} 5
apiserver_request_total{code="200",group="sandkeeper.dev",resource="sandboxes",subresource="",verb="PATCH"} 5
apiserver_request_total{code="409",group="sandkeeper.dev",resource="sandboxes",subresource="",verb="PATCH"} 1
apiserver_request_total{code="200",group="sandkeeper.dev",resource="sandboxes",subresource="status",verb="PATCH"} 5
apiserver_request_total{code="200",group="sandkeeper.dev",resource="sandboxnodes",subresource="status",verb="PATCH"} 2
apiserver_request_total{code="201",group="events.k8s.io",resource="events",subresource="",verb="POST"} 3
apiserver_request_total{code="200",group="sandkeeper.dev",resource="sandboxes",subresource="",verb="WATCH"} 9
apiserver_request_total{code="200",group="coordination.k8s.io",resource="leases",subresource="",verb="PUT"} 40
apiserver_request_duration_seconds_count{resource="sandboxes",verb="PATCH"} 11
"""


def test_percentiles_are_values_that_were_measured() -> None:
    samples = [float(number) for number in range(1, 101)]
    assert [percentile(samples, share) for share in (0, 0.5, 0.99, 1)] == [1, 51, 99, 100]
    assert percentile([7.0], 0.99) == 7
    assert milliseconds("ready", [0.25], 0.5, 0.99) == {"ready_p50_ms": 250, "ready_p99_ms": 250}


def test_writes_are_counted_with_those_refused_and_without_reads_and_leases() -> None:
    writes = parse_writes(METRICS)
    assert writes == Counter(
        {
            "POST sandboxes": 5,
            "PATCH sandboxes": 6,
            "PATCH sandboxes/status": 5,
            "PATCH sandboxnodes/status": 2,
            "POST events": 3,
        }
    )
    assert of_sandboxes(writes) == 14


def test_a_bar_is_missed_only_by_what_was_measured() -> None:
    figures = {"ready_p50_over_floor": 2.5, "burst50_per_s": 39.9, "writes_at_rest_60s": 1}
    assert bars.missed(figures) == ["burst50_per_s", "writes_at_rest_60s"]
    lines = {line.split()[0]: line for line in bars.table(figures)}
    assert lines["ready_p50_over_floor"].endswith("holds")
    assert lines["burst50_per_s"].endswith("DOES NOT HOLD")
    assert lines["sim_5000_per_s"].endswith("not measured")
    assert len({bar.figure for bar in bars.BARS}) == len(bars.BARS)


def test_a_part_that_runs_again_replaces_its_own_figures_only() -> None:
    document: dict[str, Any] = {}
    merge(document, "one", Result(figures={"a": 1, "gone": 2}, samples={"a": [1]}), {"commit": "x"})
    merge(document, "two", Result(figures={"b": 3}, curve=[{"sandboxes": 1}]), {"commit": "x"})
    merge(document, "one", Result(figures={"a": 4}), {"commit": "y"})
    assert document["figures"] == {"a": 4, "b": 3}
    assert document["parts"]["one"] == {"commit": "y", "figures": ["a"]}
    assert document["curve"] == [{"sandboxes": 1}]


def test_every_part_has_a_name_of_its_own() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_the_plot_is_a_small_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = [
        {"sandboxes": 1000 * n, "per_s": 100.0, "operator_cpu_ms": 5.0, "rss_mib": 90.0 + n, "writes": 2}
        for n in range(1, 11)
    ]
    plot.draw(curve, path := tmp_path / "images" / "scale.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 60_000
