"""The informer's cache: every Sandbox as the API server last gave it, with the indexes that passes need.

Fed by the watch, by the answers to our own writes (so that a pass sees its own write at once, and the watch
event that follows is old news), and by the LIST that repairs what a watch missed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sandkeeper.api import ASSIGNMENT_ANNOTATION
from sandkeeper.control.observation import Assignment, Key
from sandkeeper.control.ports import Raw

_TOMBSTONES = 8192


def key_of(body: Mapping[str, Any]) -> Key:
    """The queue's key of an object. Raises KeyError for something that is no namespaced object."""
    metadata = body["metadata"]
    return Key(metadata["namespace"], metadata["name"], metadata["uid"])


def newer(candidate: str, known: str) -> bool:
    """Whether a resourceVersion is later than another of the same object.

    Kubernetes 1.35 made them comparable (KEP-5504); before, and elsewhere, they were opaque, so what is not a
    number counts as newer and the level-triggered pass sorts it out.
    """
    try:
        return int(candidate) > int(known)
    except ValueError:
        return candidate != known


class Store:
    """Sandboxes by key. Implements ports.StorePort."""

    def __init__(self) -> None:
        self._objects: dict[Key, Raw] = {}
        self._keys: dict[str, Key] = {}  # by UID
        self._place: dict[Key, tuple[str, str]] = {}  # node, phase
        self._by_node: defaultdict[str, set[Key]] = defaultdict(set)
        self._counts: Counter[tuple[str, str]] = Counter()
        # UIDs that are gone: a late answer or a stale replay must not bring one back.
        self._gone: OrderedDict[str, None] = OrderedDict()

    def get(self, key: Key) -> Raw | None:
        """The object, or None."""
        return self._objects.get(key)

    def items(self) -> Iterable[Raw]:
        """Every object."""
        return self._objects.values()

    def keys(self) -> tuple[Key, ...]:
        """Every key, as of now."""
        return tuple(self._objects)

    def __len__(self) -> int:
        return len(self._objects)

    def by_uid(self, uid: str) -> Key | None:
        """The key of the object with this UID, or None."""
        return self._keys.get(uid)

    def on_node(self, node: str) -> tuple[Key, ...]:
        """Keys of the Sandboxes assigned to a node; "" for those assigned to none."""
        return tuple(self._by_node.get(node, ()))

    def counts(self) -> Mapping[tuple[str, str], int]:
        """How many Sandboxes there are by (node, phase)."""
        return self._counts

    def count_on(self, node: str) -> int:
        """How many Sandboxes are assigned to a node."""
        return len(self._by_node.get(node, ()))

    def put(self, body: Raw) -> Key | None:
        """Take in an object. Returns its key if that was news, None if it was known, older or gone."""
        key = key_of(body)
        if key.uid in self._gone:
            return None
        known = self._objects.get(key)
        metadata = body["metadata"]
        if known is not None and not newer(metadata["resourceVersion"], known["metadata"]["resourceVersion"]):
            return None
        # managedFields are half of a small object, and nobody here reads them.
        slim = {name: value for name, value in metadata.items() if name != "managedFields"}
        body = {**body, "metadata": slim}
        self._objects[key] = body
        self._keys[key.uid] = key
        text = (slim.get("annotations") or {}).get(ASSIGNMENT_ANNOTATION)
        assignment = Assignment.parse(text, key.uid)
        place = (assignment.node if assignment else "", (body.get("status") or {}).get("phase") or "Pending")
        self._move(key, place)
        return key

    def remove(self, key: Key) -> bool:
        """Drop an object that does not exist any more; returns whether it was known."""
        self._gone[key.uid] = None
        while len(self._gone) > _TOMBSTONES:
            self._gone.popitem(last=False)
        if self._objects.pop(key, None) is None:
            return False
        self._keys.pop(key.uid, None)
        self._move(key, None)
        return True

    def _move(self, key: Key, place: tuple[str, str] | None) -> None:
        before = self._place.pop(key, None)
        if before is not None:
            self._by_node[before[0]].discard(key)
            if not self._by_node[before[0]]:
                del self._by_node[before[0]]
            self._counts[before] -= 1
            if not self._counts[before]:
                del self._counts[before]
        if place is not None:
            self._place[key] = place
            self._by_node[place[0]].add(key)
            self._counts[place] += 1
