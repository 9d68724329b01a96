"""Whether all is as it would be without the fault: the objects, the nodes, and what was done on the way.

Nothing is taken from the operator's own words but its counters of calls; objects come from the API server itself,
records from the shims themselves.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.cluster import eventually
from tests.faults.apiproxy import ApiProxy, Served
from tests.faults.recorders import Life, Objects, Shims
from tests.faults.report import FINDINGS
from tests.histories import Object, violations

from sandkeeper.wire import node_pb2

_LIVE = (node_pb2.STATE_RUNNING, node_pb2.STATE_PAUSED)
_WRITTEN = ("sandboxes", "sandboxes/status", "events")
"""A node's status is no part of this: the count of its sandboxes follows half a minute later."""
_ROUTINE = ("Info", "List")
_CLOCK = 0.001
AT_ONCE = "ran at the same time"
TIME_WENT_BACK = "the lastTransitionTime of"


@dataclass(frozen=True, slots=True)
class Oracle:
    """Looks at one namespace. effects: the shims' trace; where it is not there, the records tell of starts."""

    objects: Objects
    shims: Shims
    apis: tuple[ApiProxy, ...]
    ports: tuple[int, ...]
    namespace: str
    effects: Path

    def assert_right(
        self,
        wanted: dict[str, Any],
        *,
        timeout: float = 60.0,
        since: int = 0,
        copies: bool = False,
        clocks: bool = False,
    ) -> None:
        """The end is as wanted (see `end`), nothing on the way there was wrong, and then all is quiet.

        since: how many of each object's first versions are not judged: a test wrote into the status itself.
        copies: an administrator's word was wrong, so two instances of one object may have run at once.
        clocks: some were set, so that what depends on times alone says nothing.
        """
        FINDINGS.note(end=False)
        self.until(wanted, timeout=timeout)
        self.assert_quiet()
        assert self.end() == wanted, _differences(wanted, self.end())
        FINDINGS.note(end=True)
        FINDINGS.note(starts=not self._starts(), leaks=not self._leftovers())
        wrong = [
            line
            for line in self.wrong(since)
            if not ((copies or clocks) and line.endswith(AT_ONCE)) and not (clocks and TIME_WENT_BACK in line)
        ]
        assert not wrong, "untrue history:\n" + "\n".join(wrong)

    # The end

    def until(self, wanted: dict[str, Any], *, timeout: float = 60.0) -> None:
        """All objects are as wanted."""
        eventually(
            lambda: self.end() == wanted, timeout=timeout, seen=lambda: _differences(wanted, self.end())
        )

    def end(self) -> dict[str, Any]:
        """By name, what is to be the same with and without a fault; None for an object that is gone."""
        return {name: self._end_of(name) for name in self.objects.names(self.namespace)}

    def _end_of(self, name: str) -> dict[str, Any] | None:
        body = self.objects.get(self.namespace, name)
        if not body:
            return None
        status, metadata = body["status"], body["metadata"]
        found: dict[str, Any] = {
            "phase": status.get("phase"),
            "instance": status.get("instance"),
            "conditions": {
                item["type"]: item["status"]
                if item["type"] != "Ready"
                else f"{item['status']} {item['reason']}"
                for item in status["conditions"]
            },
            "on node": sorted(
                node_pb2.State.Name(life.record.state).removeprefix("STATE_")
                for life in self.shims.present(metadata["uid"])
            ),
        }
        if status.get("observedGeneration") != metadata["generation"]:
            found["generation"] = f"{status.get('observedGeneration')} of {metadata['generation']}"
        if "exitedAt" in status:
            found["exit"] = f"{status.get('exitStatus')} {status.get('exitReason')}"
        return found

    # What must not be, whatever the end

    def wrong(self, since: int = 0) -> list[str]:
        """One line for each thing that should not have happened, or be; once all has come to an end."""
        found: list[str] = []
        for name in self.objects.names(self.namespace):
            for life in range(len(self.objects.uids(self.namespace, name))):
                found += violations(self.objects.history(self.namespace, name, life)[since:])
        uids = {life.owner.uid for life in self._lives()}
        for uid in sorted(uids):
            found += self._copies(uid)
        found += self._starts()
        found += self._leftovers()
        return found

    def _lives(self) -> list[Life]:
        return [life for life in self.shims.lives() if life.owner.namespace == self.namespace]

    def _copies(self, uid: str) -> list[str]:
        """Instances of one object that ran at the same time."""
        spans = sorted(
            (span, f"{life.owner.name} instance {life.owner.instance} on {life.node}")
            for life in self.shims.lives(uid)
            if (span := life.span) is not None
        )
        return [
            f"{earlier} and {later} {AT_ONCE}"
            for ((_, ended), earlier), ((began, _), later) in pairwise(spans)
            if began + _CLOCK < ended
        ]

    def starts(self) -> Counter[str]:
        """Sandbox id -> how often it was started on a node."""
        ids = {life.record.sandbox_id for life in self._lives()}
        counted = Counter({life.record.sandbox_id: len(life.pids) for life in self._lives()})
        if self.effects.exists():
            done = [json.loads(line) for line in self.effects.read_text().splitlines()]
            # Asked again, a shim answers the pid that there is: a start is another pid.
            started = {(each["subject"], each["pid"]) for each in done if each["effect"] == "start"}
            traced = Counter(subject for subject, _ in started)
            counted |= Counter({each: number for each, number in traced.items() if each in ids})
        return counted

    def _starts(self) -> list[str]:
        return [
            f"{sandbox_id} was started {count} times"
            for sandbox_id, count in self.starts().items()
            if count > 1
        ]

    def _leftovers(self) -> list[str]:
        """What the nodes have and no object says, and the other way round."""
        found = []
        here = {life.record.sandbox_id: life for life in self._lives() if life.removed_at is None}
        said = {
            body["status"]["sandboxID"]: body
            for name in self.objects.names(self.namespace)
            if (body := self.objects.get(self.namespace, name)) and body["status"].get("sandboxID")
        }
        for sandbox_id, life in here.items():
            status = said.get(sandbox_id, {}).get("status", {})
            if not status:
                found.append(f"{sandbox_id} of {life.owner.name} is on {life.node} and no object says so")
            elif status["nodeName"] != life.node:
                found.append(f"{sandbox_id} is on {life.node}, its object says {status['nodeName']}")
            elif life.record.state in _LIVE and status.get("pid") != life.record.pid:
                found.append(f"{sandbox_id} has pid {life.record.pid}, its object says {status.get('pid')}")
        for sandbox_id, body in said.items():
            if body["status"].get("pid") and sandbox_id not in here:
                found.append(f"{body['metadata']['name']} has a pid, and no node has {sandbox_id}")
        return found

    # Afterwards

    def assert_quiet(self, seconds: float = 2.0, *, within: float = 30.0) -> None:
        """No write to the API and no call to a shim but relists for so long, though every object is looked at."""
        deadline, since, work = time.monotonic() + within, time.monotonic(), self._work()
        passes = self.passes()
        while time.monotonic() - since < seconds:
            assert time.monotonic() < deadline, f"still at work: {self._last_work()}"
            time.sleep(0.1)
            if (now := self._work()) != work:
                since, work = time.monotonic(), now
                passes = self.passes()
        if any(self.objects.get(self.namespace, name) for name in self.objects.names(self.namespace)):
            assert self.passes() > passes, "quiet, but nothing was looked at"

    def passes(self) -> float:
        """How often the operators have looked at an object."""
        return self._count("sandkeeper_queue_passes_total")

    def _work(self) -> tuple[int, float]:
        writes = len(self._writes())
        calls = self._count("sandkeeper_shim_call_seconds_count", *(f'method="{each}"' for each in _ROUTINE))
        return writes, calls

    def _writes(self) -> list[Served]:
        return [each for api in self.apis for each in api.writes() if each.request.resource in _WRITTEN]

    def _last_work(self) -> str:
        written = self._writes()[-5:]
        return ", ".join(
            f"{each.request.method} {each.request.resource} {each.request.name} {each.code}"
            for each in written
        )

    def _count(self, metric: str, *without: str) -> float:
        """The sum of a counter over all operators, without the series that have one of these labels."""
        total = 0.0
        for port in self.ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    if line.startswith(metric) and not any(label in line for label in without):
                        total += float(line.rpartition(" ")[2])
        return total


def _differences(wanted: dict[str, Any], seen: dict[str, Any]) -> str:
    lines = [
        f"{name}: {seen.get(name)} instead of {wanted.get(name)}"
        for name in sorted(wanted.keys() | seen.keys())
        if wanted.get(name) != seen.get(name) or (name in wanted) != (name in seen)
    ]
    return "\n".join(lines)


def wanted(
    phase: str, ready: str, *, instance: int = 1, on_node: str = "", exited: str = "", **conditions: str
) -> Object:
    """An entry of `Oracle.end`. conditions: Scheduled and what else differs from that of `phase`."""
    runs = "True" if phase == "Running" else "False"
    ended = "True" if phase in ("Succeeded", "Failed") else "False"
    found: dict[str, Any] = {
        "phase": phase,
        "instance": instance,
        "conditions": {"Scheduled": "True", "Running": runs, "Finished": ended, "Ready": ready, **conditions},
        "on node": [on_node] if on_node else [],
    }
    return found | ({"exit": exited} if exited else {})
