"""From caches and, where they will not do, from the source itself: the picture that a pass decides on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from pydantic import ValidationError

from sandkeeper.api import ASSIGNMENT_ANNOTATION, FINALIZER, Sandbox, instance_digest
from sandkeeper.control import act
from sandkeeper.control.actions import Action
from sandkeeper.control.calls import Calls
from sandkeeper.control.ledger import Ledger
from sandkeeper.control.lifespan import recorded_ending, run_already, was_started
from sandkeeper.control.observation import (
    Absent,
    Assignment,
    Key,
    NodeView,
    Observation,
    Present,
    RecordView,
    Unknown,
)
from sandkeeper.control.ports import KubeError, MetricsPort, NodesPort, Raw
from sandkeeper.control.rules import FENCED, live, status_names_instance

log = logging.getLogger(__name__)

_PLACEHOLDER_SPEC = {"containers": [{"name": "invalid", "image": "invalid"}]}


@dataclass(slots=True)
class Pass:
    """What one pass knows that the caches may not know yet."""

    key: Key
    raw: Raw
    parsed: tuple[Raw, Sandbox, str, str] | None = None  # of which raw, the model, digest, why invalid
    record: RecordView | None = None  # the answer to our own last call
    refusal: tuple[str, str] | None = None
    last: Action | None = None
    current: bool = False  # the API server has said in this pass that `raw` is what it has
    fenced: bool = False

    def take(self, outcome: act.Outcome) -> None:
        self.record, self.refusal = outcome.record, outcome.refusal
        if outcome.refusal is not None and outcome.refusal[0] == FENCED:
            if self.fenced:
                # The next instance was refused as well: then it is not for its number.
                self.refusal = ("Refused", outcome.refusal[1])
            self.fenced = True

    def moved(self, raw: Raw) -> None:
        """Another instance: what was said of the one before is void."""
        self.raw, self.record, self.refusal = raw, None, None
        self.current = True


class Observer:
    """`retention`: see Observation. `aside`: see Reconciler."""

    def __init__(
        self,
        nodes: NodesPort,
        ledger: Ledger,
        calls: Calls[act.Outcome],
        metrics: MetricsPort,
        clock: Callable[[], datetime],
        retention: float,
        aside: Callable[[Key], None],
        monotonic: Callable[[], float],
    ) -> None:
        self._nodes, self._ledger, self._calls, self._metrics = nodes, ledger, calls, metrics
        self._clock, self._aside = clock, aside
        self._retention = retention
        self._monotonic = monotonic
        # Of those with a deadline: which instance, and since when it runs by the clock that nobody sets.
        self._running: dict[Key, tuple[int, float]] = {}

    def forget(self, key: Key) -> None:
        """Of an object that is gone."""
        self._running.pop(key, None)

    async def observe(self, now: Pass) -> Observation:
        """What is known of the object, its instance and its node; asks the node only where a cache will not
        do."""
        sandbox, digest, invalid = _parse(now)
        metadata = now.raw["metadata"]
        assignment, lost = assignment_of(now)
        o = Observation(
            sandbox=sandbox,
            namespace=now.key.namespace,
            name=now.key.name,
            uid=now.key.uid,
            generation=metadata.get("generation") or 0,
            deleting=bool(metadata.get("deletionTimestamp")),
            finalizing=FINALIZER in (metadata.get("finalizers") or ()),
            now=self._clock(),
            desired_digest=digest if not invalid or assignment is None else assignment.digest,
            assignment=assignment,
            nodes=self._nodes.views(),
            load=self._ledger.load(apart_from=now.key.uid),
            mass_outage=self._nodes.mass_outage,
            in_flight=self._calls.under_way(now.key),
            refusal=now.refusal,
            invalid=invalid,
            retention=self._retention,
        )
        if assignment is None:
            if lost or status_names_instance(o):
                return replace(o, assignment_lost=True, holdings=self._nodes.holdings(o.uid))
            return o
        settled = recorded_ending(o) is not None and not o.deleting
        o = replace(
            o, node=await self._node(assignment.node, settled), record=self._record(now, o, assignment)
        )
        o = self._measured(now.key, o, assignment.instance)
        if settled or o.in_flight or not _looks_lost(o):
            return o
        # A list may be older than the last Start: before something is called lost the node is asked.
        node = act.node_of(o, self._nodes, self._metrics, lambda: self._aside(now.key))
        now.record = (await act.status(node)).record or Unknown() if node is not None else Unknown()
        return replace(o, record=now.record)

    def _measured(self, key: Key, o: Observation, instance: int) -> Observation:
        """With `ran`, where it matters. An operator that was started anew has the clocks' word for what was before."""
        if o.sandbox.spec.active_deadline_seconds is None or (isinstance(o.record, Present) and not live(o)):
            self._running.pop(key, None)
        if o.sandbox.spec.active_deadline_seconds is None or not live(o):
            return o
        now = self._monotonic()
        known = self._running.get(key)
        if known is None or known[0] != instance:
            known = self._running[key] = (instance, now - run_already(o))
        return replace(o, ran=now - known[1])

    def _record(self, now: Pass, o: Observation, assignment: Assignment) -> RecordView:
        seen = self._nodes.record(assignment.node, f"{o.uid}-{assignment.instance}")
        if now.record is None or (isinstance(now.record, Unknown) and isinstance(seen, Present)):
            return seen
        return now.record

    async def _node(self, name: str, settled: bool) -> NodeView | None:
        """The node; None only where its object is really gone, which a cache alone cannot say."""
        view = self._nodes.view(name)
        if view is not None:
            return view
        try:
            if settled or await self._nodes.gone(name):
                return None
        except KubeError as error:
            log.warning("A node's object cannot be read", extra={"node": name, "error": str(error)})
        return NodeView(name=name, reachable=False)


def assignment_of(now: Pass) -> tuple[Assignment | None, bool]:
    """The trusted assignment, and whether there was one that is lost."""
    metadata = now.raw["metadata"]
    text = (metadata.get("annotations") or {}).get(ASSIGNMENT_ANNOTATION)
    assignment = Assignment.parse(text, now.key.uid)
    if assignment is not None or Assignment.foreign(text, now.key.uid):
        return assignment, False
    return None, FINALIZER in (metadata.get("finalizers") or ())


def _looks_lost(o: Observation) -> bool:
    absent = isinstance(o.record, Absent) and not o.record.proven
    return absent and was_started(o) and o.node is not None and o.node.reachable and not o.deleting


def _parse(now: Pass) -> tuple[Sandbox, str, str]:
    if now.parsed is None or now.parsed[0] is not now.raw:
        invalid = ""
        try:
            sandbox = Sandbox.model_validate(now.raw)
            digest = instance_digest(sandbox.spec)
        except (ValidationError, ValueError) as error:
            # Stored before today's schema, or with the schema switched off. It must still be deletable.
            invalid, digest = _why_invalid(error), ""
            sandbox = Sandbox.model_validate({**_identity_only(now.raw), "spec": _PLACEHOLDER_SPEC})
        now.parsed = (now.raw, sandbox, digest, invalid)
    return now.parsed[1:]


def _identity_only(raw: Raw) -> Raw:
    """An object without what may be invalid in it; the status only where it is valid by itself."""
    kept: Raw = {"metadata": raw["metadata"]}
    try:
        Sandbox.model_validate({**kept, "spec": _PLACEHOLDER_SPEC, "status": raw.get("status") or {}})
    except ValidationError:
        return kept
    return {**kept, "status": raw.get("status") or {}}


def _why_invalid(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
