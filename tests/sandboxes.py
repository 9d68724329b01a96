"""Sandboxes as a user makes and sees them: by kubectl, in one namespace."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.cluster import condition_of, eventually

from sandkeeper.localcluster.apiserver import Kubectl
from sandkeeper.localcluster.watching import manifest

Object = dict[str, Any]
TIMEOUT = 60.0
"""Seconds. Far more than anything takes on a quiet machine."""


@dataclass(frozen=True, slots=True)
class Sandboxes:
    """kubectl in a namespace. Methods that wait return the object as it then was, and raise AssertionError
    with what was seen last."""

    kubectl: Kubectl
    namespace: str

    def run(self, *args: str, **options: Any) -> str:
        return self.kubectl("-n", self.namespace, *args, **options)

    def apply(self, body: Object) -> str:
        """Returns the object's name."""
        self.run("apply", "-f", "-", input=json.dumps(body))
        return str(body["metadata"]["name"])

    def make(self, name: str, *command: str, **spec: Any) -> str:
        """Applies one of one container; see localcluster.watching.manifest."""
        return self.apply(manifest(name, *command, **spec))

    def patch(self, name: str, change: Object) -> None:
        self.run("patch", "sandbox", name, "--type=merge", "-p", json.dumps(change))

    def delete(self, name: str) -> None:
        """Asks for it; does not wait."""
        self.run("delete", "sandbox", name, "--wait=false")

    def get(self, name: str) -> Object:
        """{} where there is none."""
        text = self.run("get", "sandbox", name, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else {}

    def status(self, name: str) -> Object:
        return self.get(name).get("status", {})

    def until(self, name: str, wanted: Callable[[Object], Any], *, timeout: float = TIMEOUT) -> Object:
        """The first state of the object that is wanted; {} is asked about for one that is gone."""
        seen: list[Object] = [{}]

        def look() -> bool:
            seen[0] = self.get(name)
            return bool(wanted(seen[0]))

        eventually(look, timeout=timeout, seen=lambda: brief(seen[0]))
        return seen[0]

    def until_ready(self, name: str) -> Object:
        return self.until(name, lambda body: current(body) and ready(body) == "True")

    def until_reason(self, name: str, *reasons: str) -> Object:
        """Ready's reason is one of these, of the newest generation."""
        return self.until(
            name, lambda body: current(body) and condition_of(body, "Ready")["reason"] in reasons
        )

    def until_finished(self, name: str) -> Object:
        return self.until(name, lambda body: condition_of(body, "Finished").get("status") == "True")

    def until_instance(self, name: str, instance: int) -> Object:
        """That instance is Ready."""
        return self.until(
            name,
            lambda body: (
                current(body) and body["status"].get("instance") == instance and ready(body) == "True"
            ),
        )

    def until_gone(self, name: str) -> None:
        self.until(name, lambda body: not body)

    def events(self, name: str) -> list[Object]:
        """Those about the object, by events.k8s.io/v1."""
        found = json.loads(self.run("get", "events.events.k8s.io", "-o", "json"))["items"]
        return [each for each in found if each["regarding"].get("name") == name]

    def until_event(self, name: str, reason: str) -> Object:
        """An Event of that reason about the object."""

        def look() -> Object | None:
            return next((each for each in self.events(name) if each["reason"] == reason), None)

        found: Object = eventually(
            look, timeout=TIMEOUT, seen=lambda: [(each["reason"], each["note"]) for each in self.events(name)]
        )
        return found


def current(body: Object) -> bool:
    """Its status was computed from its newest generation."""
    if not body:
        return False
    return bool(body["status"].get("observedGeneration") == body["metadata"]["generation"])


def ready(body: Object) -> str:
    return str(condition_of(body, "Ready").get("status", ""))


def brief(body: Object) -> str:
    """What an assertion shows of an object."""
    return json.dumps(body.get("status", body), indent=1)[:4000]
