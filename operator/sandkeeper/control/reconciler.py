"""One pass over one object: observe, decide, act, and again until there is nothing to do; then the status,
once.

A pass may be cut off anywhere and lose nothing: what it has done is in the API server or on the node, and the
next pass reads it there. Nothing in memory is needed for that; what is kept here only saves calls.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from sandkeeper.control import act, status
from sandkeeper.control.actions import (
    Action,
    Assign,
    Decision,
    Delete,
    Pause,
    Release,
    Rest,
    Resume,
    Shutdown,
    Start,
    Stop,
    Verdict,
)
from sandkeeper.control.calls import Calls
from sandkeeper.control.decide import UNSCHEDULABLE, decide
from sandkeeper.control.ledger import Ledger
from sandkeeper.control.lifespan import ending, recorded_ending
from sandkeeper.control.observation import Assignment, Key, Observation
from sandkeeper.control.observe import Observer, Pass, assignment_of
from sandkeeper.control.placement import declared
from sandkeeper.control.ports import (
    Conflict,
    Gone,
    KubeError,
    KubePort,
    MetricsPort,
    NodesPort,
    NoMetrics,
    Raw,
    RecorderPort,
    StorePort,
)
from sandkeeper.control.rules import past_deadline

log = logging.getLogger(__name__)

# More steps than any way through the table has; a pass that gets there has met a fault of ours.
_MAX_STEPS = 16
_MAX_CONFLICTS = 3
_BACKOFF_FIRST, _BACKOFF_MAX = 0.2, 30.0
# So many failures in a row are told in the status; fewer are a hiccup.
_FAILURES_TO_TELL = 3


def utc_now() -> datetime:
    return datetime.now(UTC)


class Reconciler:
    """`wake(key)` is called from the event loop when a key wants a look that nothing else would give it: pass
    `queue.add`. `aside(key)` is called when its pass waits long for a node: pass `queue.step_aside`.
    `retention_seconds`: how long an ended instance stays on its node, so that its logs can be
    read. `usage_interval`: seconds from which on newer usage alone is worth a status write; 0 for never.
    """

    def __init__(
        self,
        store: StorePort,
        kube: KubePort,
        nodes: NodesPort,
        recorder: RecorderPort,
        metrics: MetricsPort | None = None,
        clock: Callable[[], datetime] = utc_now,
        *,
        wake: Callable[[Key], None] | None = None,
        aside: Callable[[Key], None] = lambda key: None,
        retention_seconds: float = 0.0,
        usage_interval: float = 0.0,
        patience: float = 3.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._kube, self._nodes, self._recorder = store, kube, nodes, recorder
        self._metrics = metrics or NoMetrics()
        self.wake = wake
        self._aside = aside
        self._usage_interval = usage_interval
        self._calls: Calls[act.Outcome] = Calls(self._wake, patience)
        self._ledger = Ledger()
        self._observer = Observer(
            nodes, self._ledger, self._calls, self._metrics, clock, retention_seconds, aside, monotonic
        )
        self._ledger_complete = False
        self._failures: dict[Key, int] = {}
        self._unschedulable: set[Key] = set()
        self._told: set[Key] = set()  # whose end was written by their last pass
        self._since: dict[Key, float] = {}  # when an object that is not Ready yet was seen first

    async def reconcile(self, key: Key) -> float | None:
        """Seconds until the next look, 0 for at once, None for no look until something changes.

        Raises nothing that is to be expected: the API server's and a shim's failures end in a delay.
        """
        began, result = time.perf_counter(), "error"
        try:
            again = await self._reconcile(key)
            result = "success" if again is None else "requeue"
        except Gone:
            self._forget(key)
            again, result = None, "gone"
        except Conflict:
            again, result = self._backoff(key), "conflict"
        except KubeError as error:
            again, result = self._backoff(key), "error"
            log.warning("API server failed", extra={**_names(key), "error": str(error), "retry_in": again})
        finally:
            self._metrics.reconciled(result, time.perf_counter() - began)
        return again

    def nodes_changed(self) -> None:
        """A node came, went, or has other room or labels: look again at what found none."""
        waiting, self._unschedulable = self._unschedulable, set()
        for key in waiting:
            self._wake(key)

    async def close(self) -> None:
        """Cancels the calls that are under way."""
        await self._calls.close()

    # The pass

    async def _reconcile(self, key: Key) -> float | None:
        raw = self._store.get(key)
        if raw is None:
            self._forget(key)
            return None
        if not self._ledger_complete:
            for known in self._store.items():
                self._ledger.note(known)
            self._ledger_complete = True
        self._since.setdefault(key, time.perf_counter())
        now = Pass(key, raw)
        for _ in range(_MAX_CONFLICTS):
            try:
                return await self._run(now)
            except Conflict:
                # The cache is behind, or somebody else writes: go on from what is true now.
                now = Pass(key, await self._read(key), current=True)
        raise Conflict(f"{key.namespace}/{key.name} is written by somebody else all the time")

    async def _read(self, key: Key) -> Raw:
        """The object as it is now. Raises Gone where there is none, or another."""
        raw = await self._kube.get(key.namespace, key.name)
        if raw["metadata"]["uid"] != key.uid:
            raise Gone(f"{key.namespace}/{key.name} is another object now")
        return raw

    async def _run(self, now: Pass) -> float | None:
        ended_call = self._calls.collect(now.key)
        if ended_call is not None:
            instance, outcome = ended_call
            assignment = assignment_of(now)[0]
            if assignment is not None and assignment.instance == instance:
                if outcome.trouble:
                    return await self._in_trouble(now, outcome.trouble)
                now.take(outcome)
        for _ in range(_MAX_STEPS):
            observation = await self._observer.observe(now)
            decision = decide(observation)
            self._note_placement(now.key, decision)
            if isinstance(decision.action, Rest):
                wrote = await self._write_status(now, observation, decision)
                if wrote and (ending(observation) is not None or past_deadline(observation)):
                    # How it ended, or why it is to end, is safe now. The consequences come after what waits: of many
                    # that end at once each is told before any is cleared away.
                    if now.key in self._told and now.last is None:
                        return self._backoff(now.key)  # what was written does not stay
                    self._told.add(now.key)
                    return 0.0
                self._told.discard(now.key)
                self._settled(now.key, decision)
                return decision.requeue_after
            if not now.current and _unchecked(observation, decision.action):
                now.raw, now.current = await self._read(now.key), True
                continue
            if decision.action == now.last:
                return await self._in_trouble(now, f"{type(decision.action).__name__} has no effect")
            now.last = decision.action
            log.debug(
                "Acting", extra={**_names(now.key), "action": str(decision.action), "reason": decision.reason}
            )
            trouble = await self._act(now, observation, decision.action)
            if isinstance(decision.action, Release | Delete):
                return None
            if trouble:
                return await self._in_trouble(now, trouble)
        return self._backoff(now.key)

    async def _act(self, now: Pass, o: Observation, action: Action) -> str:
        """Does it; returns what went wrong that may pass, empty for nothing."""
        match action:
            case Assign(assignment=assignment):
                await self._assign(now, o, assignment)
                return ""
            case Release():
                now.raw = await act.release(self._kube, self._metrics, now.raw)
                if not now.raw["metadata"].get("finalizers"):
                    # Ours was the last: it is gone, and must not be worked on again until the watch says so.
                    self._store.remove(now.key)
                self._forget(now.key)
                return ""
            case Delete():
                await act.delete(self._kube, self._metrics, now.raw)
                return ""
            case _:
                return await self._call(now, o, action)

    async def _assign(self, now: Pass, o: Observation, assignment: Assignment) -> None:
        began = time.perf_counter()
        self._ledger.enter(now.key.uid, assignment.node, declared(o.sandbox.spec))
        try:
            now.moved(await act.assign(self._kube, self._metrics, now.raw, assignment))
        except BaseException:
            self._ledger.note(now.raw)
            raise
        self._metrics.stage("assign", time.perf_counter() - began)

    async def _call(self, now: Pass, o: Observation, action: Action) -> str:
        node = act.node_of(o, self._nodes, self._metrics, lambda: self._aside(now.key))
        if node is None or o.assignment is None:
            return "the node's shim cannot be asked"
        call: Coroutine[Any, Any, act.Outcome]
        match action:
            case Start():
                call = act.start(node, o)
            case Pause():
                call = act.pause(node)
            case Resume():
                call = act.resume(node)
            case Stop(grace_seconds=grace):
                call = act.stop(node, grace)
            case Shutdown(grace_seconds=patience):
                call = act.shutdown(node, patience)
            case _:
                raise TypeError(f"{action} is no call to a shim")
        outcome = await self._calls.make(now.key, type(action).__name__, o.assignment.instance, call)
        if outcome is None:
            return ""  # under way: the next observation says so
        if outcome.trouble:
            return outcome.trouble
        now.take(outcome)
        self._failures.pop(now.key, None)
        return ""

    # The status

    async def _write_status(self, now: Pass, o: Observation, decision: Decision) -> bool:
        """Writes the status where it differs; whether it did."""
        if decision.verdict is Verdict.UNSAID or (o.deleting and not o.finalizing):
            return False
        after = status.compute(o, decision)
        before = o.sandbox.status
        if not status.changed(before, after, usage_interval=self._usage_interval):
            return False
        patch = status.merge_patch(now.raw.get("status") or {}, after.to_dict())
        began = time.perf_counter()
        now.raw = await act.write_status(self._kube, self._metrics, now.raw, patch)
        self._metrics.stage("status", time.perf_counter() - began)
        self._ledger.note(now.raw)
        for happening in status.happenings(o, decision, after):
            self._recorder.event(now.raw, happening.type, happening.reason, happening.action, happening.note)
        log.info(
            "Status written",
            extra={
                **_names(now.key),
                "reason": decision.reason,
                "phase": after.phase,
                "instance": after.instance,
            },
        )
        return True

    async def _in_trouble(self, now: Pass, trouble: str) -> float:
        """Something failed that may pass: try again later, and say so when it goes on."""
        delay = self._backoff(now.key)
        log.warning("Trying again", extra={**_names(now.key), "error": trouble, "retry_in": round(delay, 2)})
        if self._failures[now.key] >= _FAILURES_TO_TELL:
            observation = await self._observer.observe(now)
            if not isinstance(decide(observation).action, Rest):
                told = Decision(Rest(), "ShimFailing", Verdict.UNKNOWN, trouble)
                await self._write_status(now, observation, told)
        return delay

    # Bookkeeping

    def _settled(self, key: Key, decision: Decision) -> None:
        self._failures.pop(key, None)
        if decision.verdict is Verdict.READY and (since := self._since.pop(key, None)) is not None:
            self._metrics.stage("ready", time.perf_counter() - since)

    def _note_placement(self, key: Key, decision: Decision) -> None:
        if decision.reason == UNSCHEDULABLE:
            self._unschedulable.add(key)
        else:
            self._unschedulable.discard(key)

    def _backoff(self, key: Key) -> float:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        full = min(_BACKOFF_MAX, _BACKOFF_FIRST * 2.0 ** min(failures - 1, 16))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 - not for secrets

    def _drop(self, key: Key) -> None:
        if self._ledger.drop(key.uid):
            self.nodes_changed()

    def _forget(self, key: Key) -> None:
        self._drop(key)
        self._observer.forget(key)
        self._failures.pop(key, None)
        self._unschedulable.discard(key)
        self._told.discard(key)
        self._since.pop(key, None)

    def _wake(self, key: Key) -> None:
        if self.wake is not None:
            self.wake(key)


def _unchecked(o: Observation, action: Action) -> bool:
    """It would be done even if the cache is behind: no write that the API server would refuse goes with it, and
    the shim fences by the instance alone. What deletes, or forgets what is recorded, nothing takes back."""
    match action:
        case Start() | Stop() | Pause() | Resume() | Delete():
            return True
        case Shutdown():
            return not o.deleting and recorded_ending(o) is None
    return False


def _names(key: Key) -> dict[str, str]:
    return {"namespace": key.namespace, "sandbox": key.name, "uid": key.uid}
