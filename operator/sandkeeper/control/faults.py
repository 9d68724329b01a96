"""The operator's effects by name, and an API client and shim clients that fail at them on command.

Used only where the settings name a failpoint or a trace (`sandkeeper.failpoints`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from sandkeeper.api import ASSIGNMENT_ANNOTATION
from sandkeeper.control.kube import Kube, Unavailable
from sandkeeper.control.ports import Raw
from sandkeeper.failpoints import Effects, Note
from sandkeeper.wire import node_pb2
from sandkeeper.wire.client import ShimClient
from sandkeeper.wire.errors import DeadlineExceeded
from sandkeeper.wire.ids import OwnerKey

EFFECTS: Mapping[str, str] = {
    "assign": "finalizer and assignment are in the object",
    "create": "the shim was told to create an instance",
    "start": "the shim was told to start it",
    "write_status": "the object's status is written",
    "pause": "the shim was told to pause it",
    "resume": "the shim was told to resume it",
    "stop": "the shim was told to stop it",
    "shutdown": "the shim was told to shut it down",
    "release": "the finalizer is off",
    "delete": "an expired object is deleted",
    "post_event": "an Event is posted",
    "write_node_status": "a SandboxNode's status is written",
}
"""Everything that the operator changes outside itself, in the order of a Sandbox's life."""

TRUST_EFFECTS: Mapping[str, str] = {
    "make_ca": "the Secret with the CA is there",
    "publish_ca": "the shims' ConfigMap has its certificate",
    "approve": "a request for a certificate is approved or denied",
    "sign": "the certificate is in the request, or why there is none",
}
"""The same for certificates, where the operator signs them."""

_BY_RESOURCE = {
    "sandboxes/status": "write_status",
    "sandboxnodes/status": "write_node_status",
    "events": "post_event",
    "secrets": "make_ca",
    "configmaps": "publish_ca",
    "certificatesigningrequests/approval": "approve",
    "certificatesigningrequests/status": "sign",
}


class FaultyKube(Kube):
    """Fails with Unavailable: the request may have had its effect."""

    def __init__(self, *args: Any, effects: Effects, **options: Any) -> None:
        super().__init__(*args, **options)
        self._effects = effects

    async def _call(self, verb: str, path: str, resource: str, body: Raw | None = None) -> Raw:
        effect = _effect(verb, resource, body)
        if not effect:
            return await super()._call(verb, path, resource, body)
        async with self._effects.at(effect, path.partition("/namespaces/")[2], Unavailable):
            return await super()._call(verb, path, resource, body)


def _effect(verb: str, resource: str, body: Raw | None) -> str:
    """Which effect a request has; empty for a read."""
    if verb == "GET":
        return ""
    if resource == "sandboxes":
        if verb == "DELETE":
            return "delete"
        annotations = ((body or {}).get("metadata") or {}).get("annotations") or {}
        return "assign" if ASSIGNMENT_ANNOTATION in annotations else "release"
    return _BY_RESOURCE[resource]


class FaultyShim(ShimClient):
    """Fails with DeadlineExceeded: the call may have had its effect."""

    def __init__(self, *args: Any, effects: Effects, **options: Any) -> None:
        super().__init__(*args, **options)
        self._effects = effects

    def _at(self, name: str, owner: OwnerKey) -> AbstractAsyncContextManager[Note]:
        return self._effects.at(name, owner.sandbox_id, DeadlineExceeded)

    async def create(self, owner: OwnerKey, config: node_pb2.SandboxConfig, /, **options: Any) -> str:
        async with self._at("create", owner):
            return await super().create(owner, config, **options)

    async def start(self, owner: OwnerKey, /, **options: Any) -> int:
        async with self._at("start", owner):
            return await super().start(owner, **options)

    async def pause(self, owner: OwnerKey, /, **options: Any) -> None:
        async with self._at("pause", owner):
            await super().pause(owner, **options)

    async def resume(self, owner: OwnerKey, /, **options: Any) -> None:
        async with self._at("resume", owner):
            await super().resume(owner, **options)

    async def stop(self, owner: OwnerKey, grace_seconds: int, /, **options: Any) -> None:
        async with self._at("stop", owner):
            await super().stop(owner, grace_seconds, **options)

    async def shutdown(self, owner: OwnerKey, /, **options: Any) -> None:
        async with self._at("shutdown", owner):
            await super().shutdown(owner, **options)
