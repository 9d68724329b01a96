"""Prometheus metrics. Their names are part of the operator's interface; docs/operations.md explains some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_PASS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_START = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """All counters. Implements ports.MetricsPort and the observers of queue and kube."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._reconcile = Histogram(
            "sandkeeper_reconcile_seconds",
            "Time of a pass over one Sandbox, by result.",
            ["result"],
            buckets=_PASS,
            registry=registry,
        )
        self._depth = Gauge(
            "sandkeeper_queue_keys", "Keys in the work queue, by state.", ["state"], registry=registry
        )
        self._waited = Histogram(
            "sandkeeper_queue_wait_seconds",
            "Time a key waited for its pass.",
            buckets=_PASS,
            registry=registry,
        )
        self._passes = Counter(
            "sandkeeper_queue_passes", "Passes ended, by outcome.", ["outcome"], registry=registry
        )
        self._stage = Histogram(
            "sandkeeper_sandbox_stage_seconds",
            "Time that a stage on a Sandbox's way to Ready took; `ready` is all of it.",
            ["stage"],
            buckets=_START,
            registry=registry,
        )
        self._writes = Counter(
            "sandkeeper_api_writes", "Writes of Sandboxes, by what was written.", ["what"], registry=registry
        )
        self._requests = Histogram(
            "sandkeeper_api_request_seconds",
            "Requests to the API server, by verb, resource and HTTP status.",
            ["verb", "resource", "code"],
            buckets=_PASS,
            registry=registry,
        )
        self._calls = Histogram(
            "sandkeeper_shim_call_seconds",
            "Calls to shims, by method and gRPC code.",
            ["method", "code"],
            buckets=_PASS,
            registry=registry,
        )
        self._events = Counter(
            "sandkeeper_events", "Kubernetes Events, by what became of them.", ["outcome"], registry=registry
        )
        self._watch = Counter(
            "sandkeeper_watch_events",
            "Watch events, by resource and type.",
            ["resource", "type"],
            registry=registry,
        )
        self._missed = Counter(
            "sandkeeper_watch_missed",
            "Changes that only a LIST showed: the watch had missed them.",
            registry=registry,
        )
        self._garbage = Counter(
            "sandkeeper_garbage",
            "Sandboxes on nodes without an owner, by outcome.",
            ["outcome"],
            registry=registry,
        )
        self._expiry = Gauge(
            "sandkeeper_certificate_expiry_timestamp_seconds",
            "When a certificate ends: the CA's, and the operator's own, which it renews.",
            ["certificate"],
            registry=registry,
        )
        self._requests_for = Counter(
            "sandkeeper_certificate_requests",
            "Shims' requests for certificates, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        # A child is looked up under a lock and by freshly made text: dear, dozens of times per Sandbox.
        self._reconcile_of = cache(self._reconcile.labels)
        self._calls_of = cache(self._calls.labels)
        self._writes_of = cache(self._writes.labels)
        self._stage_of = cache(self._stage.labels)
        self._passes_of = cache(self._passes.labels)
        self._requests_of = cache(self._requests.labels)
        self._watch_of = cache(self._watch.labels)
        self._waiting, self._running, self._delayed = map(
            self._depth.labels, ("waiting", "running", "delayed")
        )

    # ports.MetricsPort

    def reconciled(self, result: str, seconds: float) -> None:
        self._reconcile_of(result).observe(seconds)

    def shim_call(self, node: str, method: str, result: str, seconds: float) -> None:
        # Not by node as well: nodes times methods times codes times buckets would be too many series.
        self._calls_of(method, result).observe(seconds)

    def api_write(self, what: str) -> None:
        self._writes_of(what).inc()

    def stage(self, stage: str, seconds: float) -> None:
        self._stage_of(stage).observe(max(0.0, seconds))

    # queue.QueueObserver

    def depth(self, waiting: int, running: int, delayed: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)
        self._delayed.set(delayed)

    def started(self, waited: float) -> None:
        self._waited.observe(waited)

    def finished(self, outcome: str, took: float) -> None:
        self._passes_of(outcome).inc()

    # kube.RequestObserver

    def api_request(self, verb: str, resource: str, code: str, seconds: float) -> None:
        self._requests_of(verb, resource, code).observe(seconds)

    # The rest of the operator

    def event(self, outcome: str) -> None:
        """An Event was posted, aggregated, dropped or failed."""
        self._events.labels(outcome).inc()

    def watch_event(self, resource: str, kind: str) -> None:
        self._watch_of(resource, kind).inc()

    def watch_missed(self) -> None:
        self._missed.inc()

    def garbage(self, outcome: str) -> None:
        self._garbage.labels(outcome).inc()

    # trust.Metrics

    def certificate(self, which: str, ends: datetime) -> None:
        self._expiry.labels(which).set(ends.timestamp())

    def certificate_request(self, outcome: str) -> None:
        self._requests_for.labels(outcome).inc()

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Link(Protocol):
    @property
    def reachable(self) -> bool: ...
    def relist_age(self) -> float | None: ...


class _NodesView(Protocol):
    def links(self) -> Mapping[str, _Link]: ...


class Snapshot(Collector):
    """Gauges that are read when they are asked for, so that they cost nothing in between and never lag."""

    def __init__(self, sandboxes: Mapping[tuple[str, str], int], nodes: _NodesView) -> None:
        self._sandboxes = sandboxes
        self._nodes = nodes

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Called by the registry at each scrape."""
        count = GaugeMetricFamily(
            "sandkeeper_sandboxes", "Sandboxes, by node and phase.", labels=["node", "phase"]
        )
        for (node, phase), number in list(self._sandboxes.items()):
            count.add_metric([node, phase], number)
        yield count
        reachable = GaugeMetricFamily(
            "sandkeeper_node_reachable", "1 while a node's shim answers.", labels=["node"]
        )
        age = GaugeMetricFamily(
            "sandkeeper_node_relist_age_seconds",
            "Time since a node last answered List: how old the picture of it may be.",
            labels=["node"],
        )
        for name, link in self._nodes.links().items():
            reachable.add_metric([name], float(link.reachable))
            if (seconds := link.relist_age()) is not None:
                age.add_metric([name], seconds)
        yield reachable
        yield age
