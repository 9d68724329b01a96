"""Kubernetes Events (events.k8s.io/v1): aggregated, rate limited, posted in the background.

An Event is for people, and never worth a pass: `event` returns at once and raises nothing; where too much
happens, Events are dropped and counted. Aggregation and the limit follow client-go's
tools/events/event_broadcaster.go and tools/record/events_cache.go.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from sandkeeper.control.ports import Gone, KubeError, Raw

log = logging.getLogger(__name__)

CONTROLLER = "sandkeeper.dev/operator"
# Steps that every Sandbox takes: told by its conditions already, posted only where `All` is asked for.
ROUTINE = frozenset(
    {
        "Scheduled",
        "Creating",
        "Created",
        "Pulling",
        "Pulled",
        "Starting",
        "Started",
        "Running",
        "Completed",
        "Stopping",
        "Stopped",
        "Deleting",
    }
)
_SAME_WITHIN = 360.0
_SERIES_EVERY = 30.0
_BURST, _REFILL = 25.0, 1 / 60
_NOTE_MAX = 1024
_REMEMBERED = 4096

Level = Literal["None", "Warning", "Notable", "All"]


class EventsClient(Protocol):
    """The part of Kube that is used here."""

    async def create_event(self, namespace: str, body: Raw) -> Raw: ...
    async def patch_event(self, namespace: str, name: str, body: Raw) -> Raw: ...


class Counting(Protocol):
    """The part of Metrics that is used here."""

    def event(self, outcome: str) -> None: ...


@dataclass(slots=True)
class _Series:
    body: Raw
    count: int
    last: float
    posted_at: float = 0.0
    created: bool = False
    queued: bool = False
    timer: asyncio.TimerHandle | None = None


class Recorder:
    """Implements ports.RecorderPort. `run` posts what `event` was told, until cancelled."""

    def __init__(
        self, kube: EventsClient, metrics: Counting, level: Level = "Notable", queue_size: int = 1024
    ) -> None:
        self._kube = kube
        self._metrics = metrics
        self._level = level
        self._queue: asyncio.Queue[_Series] = asyncio.Queue(queue_size)
        self._series: OrderedDict[tuple[str, ...], _Series] = OrderedDict()
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._instance = socket.gethostname()[:128]

    def event(
        self,
        obj: Mapping[str, Any],
        type: Literal["Normal", "Warning"],  # noqa: A002 - the API's word
        reason: str,
        action: str,
        note: str,
    ) -> None:
        """Note that something happened to `obj`; `note` is cut at the API's limit of 1024 bytes."""
        try:
            self._event(obj, type, reason, action, note)
        except Exception:
            self._metrics.event("failed")
            log.exception("An Event could not be made")

    async def run(self) -> None:
        """Post, one at a time: Events must not crowd out the writes that matter."""
        while True:
            series = await self._queue.get()
            series.queued = False
            try:
                await self._post(series)
            except KubeError as error:
                self._metrics.event("failed")
                log.debug("An Event was not posted", extra={"error": str(error)})
            finally:
                self._queue.task_done()

    async def drain(self, seconds: float) -> None:
        """Give what is queued `seconds` to be posted; `run` must be running."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._queue.join(), seconds)

    def _wanted(self, kind: str, reason: str) -> bool:
        if self._level == "None":
            return False
        return (
            kind == "Warning" or self._level == "All" or (self._level == "Notable" and reason not in ROUTINE)
        )

    def _event(self, obj: Mapping[str, Any], kind: str, reason: str, action: str, note: str) -> None:
        if not self._wanted(kind, reason):
            return
        metadata = obj["metadata"]
        note = note.encode()[:_NOTE_MAX].decode(errors="ignore")
        key = (metadata["uid"], kind, reason, action, note)
        now = time.monotonic()
        series = self._series.get(key)
        if series is not None and now - series.last < _SAME_WITHIN:
            series.count += 1
            series.last = now
            self._metrics.event("aggregated")
            self._later(series, max(0.0, series.posted_at + _SERIES_EVERY - now))
            return
        if not self._allowed(metadata["uid"], now):
            self._metrics.event("limited")
            return
        series = _Series(self._body(obj, kind, reason, action, note), count=1, last=now, posted_at=now)
        self._series[key] = series
        self._series.move_to_end(key)
        while len(self._series) > _REMEMBERED:
            self._series.popitem(last=False)
        self._enqueue(series)

    def _allowed(self, uid: str, now: float) -> bool:
        tokens, since = self._tokens.pop(uid, (_BURST, now))
        tokens = min(_BURST, tokens + (now - since) * _REFILL)
        allowed = tokens >= 1
        self._tokens[uid] = (tokens - 1 if allowed else tokens, now)
        while len(self._tokens) > _REMEMBERED:
            self._tokens.popitem(last=False)
        return allowed

    def _later(self, series: _Series, seconds: float) -> None:
        if series.timer is None and not series.queued:
            series.timer = asyncio.get_running_loop().call_later(seconds, self._due, series)

    def _due(self, series: _Series) -> None:
        series.timer = None
        self._enqueue(series)

    def _enqueue(self, series: _Series) -> None:
        try:
            self._queue.put_nowait(series)
            series.queued = True
        except asyncio.QueueFull:
            self._metrics.event("dropped")

    async def _post(self, series: _Series) -> None:
        namespace, name = series.body["metadata"]["namespace"], series.body["metadata"]["name"]
        series.posted_at = time.monotonic()
        if series.created:
            patch = {"series": {"count": series.count, "lastObservedTime": _now()}}
            try:
                await self._kube.patch_event(namespace, name, patch)
                self._metrics.event("posted")
                return
            except Gone:  # Events live for an hour.
                series.body["eventTime"] = _now()
                series.count = 1
        body = dict(series.body)
        if series.count > 1:
            body["series"] = {"count": series.count, "lastObservedTime": _now()}
        await self._kube.create_event(namespace, body)
        series.created = True
        self._metrics.event("posted")

    def _body(self, obj: Mapping[str, Any], kind: str, reason: str, action: str, note: str) -> Raw:
        metadata = obj["metadata"]
        namespace = metadata.get("namespace") or "default"
        moment = _now()
        seed = "\0".join((metadata["uid"], kind, reason, action, note, moment))
        suffix = hashlib.sha256(seed.encode()).hexdigest()[:16]
        regarding = {
            "apiVersion": obj.get("apiVersion"),
            "kind": obj.get("kind"),
            "namespace": metadata.get("namespace"),
            "name": metadata["name"],
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion"),
        }
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name'][:230]}.{suffix}", "namespace": namespace},
            "eventTime": moment,
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance,
            "action": action,
            "reason": reason,
            "type": kind,
            "note": note,
            "regarding": {name: value for name, value in regarding.items() if value is not None},
        }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
