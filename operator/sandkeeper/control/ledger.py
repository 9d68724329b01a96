"""How much of each node is given away: the declared limits of what is assigned, summed by node.

Placement decides on these sums, so what is decided is entered at once, before the API server has been asked:
two passes that decide at the same time must not both take the last room.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from sandkeeper.api import ASSIGNMENT_ANNOTATION, SandboxSpec
from sandkeeper.control.observation import Assignment, Resources
from sandkeeper.control.placement import declared
from sandkeeper.control.ports import Raw


class Ledger:
    """One entry per UID: the node and what is held there."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, Resources]] = {}
        self._totals: dict[str, Resources] = {}

    def enter(self, uid: str, node: str, held: Resources) -> None:
        """`uid` holds this on `node`, and nothing anywhere else."""
        if self._entries.get(uid) == (node, held):
            return
        self.drop(uid)
        self._entries[uid] = (node, held)
        self._totals[node] = self._totals.get(node, Resources()) + held

    def drop(self, uid: str) -> bool:
        """`uid` holds nothing any more; whether it did."""
        entry = self._entries.pop(uid, None)
        if entry is None:
            return False
        node, held = entry
        total = self._totals[node] - held
        if total == Resources():
            del self._totals[node]
        else:
            self._totals[node] = total
        return True

    def load(self, apart_from: str) -> Mapping[str, Resources]:
        """By node, what everything but the UID `apart_from` holds."""
        entry = self._entries.get(apart_from)
        if entry is None:
            return self._totals
        return {**self._totals, entry[0]: self._totals[entry[0]] - entry[1]}

    def note(self, raw: Raw) -> None:
        """Enter what an object's assignment says; one that is assigned but ended holds nothing."""
        metadata, status = raw["metadata"], raw.get("status") or {}
        uid = metadata["uid"]
        text = (metadata.get("annotations") or {}).get(ASSIGNMENT_ANNOTATION)
        assignment = Assignment.parse(text, uid)
        ended = assignment and status.get("instance") == assignment.instance and status.get("exitedAt")
        if assignment is None or ended:
            self.drop(uid)
            return
        try:
            held = declared(SandboxSpec.model_validate(raw["spec"]))
        except (ValidationError, ValueError, KeyError):
            held = Resources(sandboxes=1)
        self.enter(uid, assignment.node, held)
